#!/usr/bin/env bash
# The tiny releases under playground/zoo: from the checkpoints that scripts/families.sh leaves through the whole pipeline.
# Each is released in bfloat16, evaluated as released, released again with what was found in its card, and verified; then
# docs/MODEL_ZOO.md is made anew. Minutes on a CPU. Run again, it goes on where it stopped.
#   bash scripts/families.sh && bash scripts/zoo_tiny.sh     all four, into playground/zoo
#   FAMILIES=checkpoints/mine bash scripts/zoo_tiny.sh       from checkpoints elsewhere: llava-dense, llava-skip, hd-skip, cos-skip
#   bash scripts/zoo_tiny.sh --fresh                         forget what was done, and start over
# Environment: SEED (1: of the families), FAMILIES (checkpoints/tiny-families-seed$SEED), BENCH (the toy benchmark; drawn
# where it is absent), ZOO (playground/zoo), PAGE (docs/MODEL_ZOO.md; empty: none), TIMING (6: answers that are timed),
# PYTHON (the interpreter; .venv's where there is one), WORK (marks of finished steps).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

source scripts/steps.sh
options "$@"
check_seed
: "${FAMILIES:=checkpoints/tiny-families-seed$SEED}" "${BENCH:=playground/data/toy-fine-seed$SEED}" "${ZOO:=playground/zoo}"
: "${PAGE=docs/MODEL_ZOO.md}" "${TIMING:=6}"
if [ -z "${PYTHON:=}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi
export PYTHON OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

names="llava-dense llava-skip hd-skip cos-skip"
released() { case "$1" in hd-*) echo "tiny-llava-$1" ;; *) echo "tiny-$1" ;; esac; }
pretrained() { case "$1" in hd-*) echo v1_5_hd-pretrain ;; cos-*) echo cos-pretrain ;; *) echo v1_5-pretrain ;; esac; }

missing=""
for name in $names; do [ -e "$FAMILIES/$name/config.json" ] || missing+=" $FAMILIES/$name"; done
if [ -n "$missing" ]; then
    echo "$own: no checkpoint in$missing; train them by: bash scripts/families.sh, or say where they are: FAMILIES" >&2
    exit 2
fi

work=${WORK:-playground/families/zoo-seed$SEED}
[ "$fresh" = 0 ] || rm -rf "$work"
mkdir -p "$work" "$ZOO/reports"
started=$SECONDS

if [ ! -e "$BENCH/bench.jsonl" ]; then step data "" "$BENCH/bench.jsonl" llava_sv data toy --output "$BENCH" --seed "$SEED"; fi
first=$(head -n 1 "$BENCH/bench.jsonl" | sed -n 's/.*"image": "\([^"]*\)".*/\1/p')
cp "$BENCH/images/$first" "$ZOO/example.${first##*.}"

# release NAME STEP FLAG...: of $FAMILIES/NAME
release() {
    local name=$1 to step=$2 pretraining input
    to=$(released "$name") input="$FAMILIES/$1/config.json"
    shift 2
    pretraining="$FAMILIES/$(pretrained "$name")"
    [ "$step" = release ] || input="$ZOO/reports/$to.json"
    if [ -d "$pretraining" ]; then set -- "$@" --pretrain-run "$pretraining"; fi
    step "$step-$name" "$input" "$ZOO/$to" llava_sv release "$FAMILIES/$name" --out "$ZOO/$to" --force \
        --dtype bfloat16 --name "$to" --card playground/zoo/card.yaml "$@"
}

for name in $names; do
    to=$(released "$name")
    release "$name" release --no-smoke-test # what will be published is loaded and compared below
    step "eval-$name" "$FAMILIES/$name/config.json" "$ZOO/reports/$to.json" \
        llava_sv eval --task toy --data-path "$BENCH" --model-path "$ZOO/$to" --device cpu --timing "$TIMING" \
        --json "$ZOO/reports/$to.json"
    dense=()
    if [ "$name" = llava-skip ]; then dense=(--eval-dense "$ZOO/reports/$(released llava-dense).json"); fi
    release "$name" card --eval "$ZOO/reports/$to.json" "${dense[@]}"
    llava_sv verify "$ZOO/$to"
done

if [ -n "$PAGE" ]; then llava_sv zoo --released "$ZOO" --markdown "$PAGE" --overwrite >/dev/null; fi
echo "[$((SECONDS - started)) s] $(du -sh "$ZOO" | cut -f 1) in $ZOO${PAGE:+, told in $PAGE}"
