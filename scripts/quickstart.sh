#!/usr/bin/env bash
# From a fresh clone to a trained Skip-Vision model and a report, on a CPU, in minutes. Run again, it goes on where it
# stopped. Another seed draws other data and trains other models, in folders of their own.
#   bash scripts/quickstart.sh               everything, into playground/quickstart/report.{md,json,png}
#   SEED=2 bash scripts/quickstart.sh        the same with another seed
#   bash scripts/quickstart.sh --fresh       forget what this seed has made, and start over
# Environment: SEED (1), LLAVA_SV_NO_VENV=1 (use the active environment), TOY_TRAIN and TOY_BENCH (images, questions).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

export SEED=${SEED:-1}
case "$SEED" in ''|*[!0-9]*) echo "quickstart: SEED must be a whole number, got '$SEED'" >&2; exit 2 ;; esac
fresh=0
case "${1:-}" in
    "") ;;
    --fresh) fresh=1 ;;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' scripts/quickstart.sh; exit 0 ;;
    *) echo "quickstart: unknown option '$1'; known: --fresh, --help" >&2; exit 2 ;;
esac

suffix=""
[ "$SEED" = 1 ] || suffix="-seed$SEED"
data="playground/data/toy$suffix"
pretrained="checkpoints/tiny$suffix-pretrain"
dense="checkpoints/tiny$suffix-dense"
skip="checkpoints/tiny$suffix-skip"
report="playground/quickstart"
work="$report/seed$SEED"
[ "$fresh" = 0 ] || rm -rf "$data" "$pretrained" "$dense" "$skip" "$work"
mkdir -p "$work"

started=$SECONDS
# step NAME COMMAND...: run once; a finished step leaves a mark that holds the seconds it took, and is passed over later.
step() {
    local name=$1 begun=$SECONDS
    shift
    if [ -e "$work/$name.done" ]; then
        echo "[$((SECONDS - started)) s] $name: done before, in $(cat "$work/$name.done") s"
        return
    fi
    echo "[$((SECONDS - started)) s] $name ..."
    "$@" || { local code=$?; echo "quickstart: $name failed (exit code $code); mend it and run this again: it goes on here" >&2; exit "$code"; }
    echo "$((SECONDS - begun))" >"$work/$name.done"
    echo "[$((SECONDS - started)) s] $name took $((SECONDS - begun)) s"
}

if [ -n "${LLAVA_SV_NO_VENV:-}" ]; then
    bash scripts/setup.sh --no-venv
else
    bash scripts/setup.sh
    export PATH="$PWD/.venv/bin:$PATH"
fi
echo "[$((SECONDS - started)) s] environment ready"

cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}
export TOKENIZERS_PARALLELISM=false
export PRESET=tiny DATA_DIR="$data"

step data llava-sv data toy --output "$data" --seed "$SEED" ${TOY_TRAIN:+--train "$TOY_TRAIN"} ${TOY_BENCH:+--bench "$TOY_BENCH"}
step pretrain env OUTPUT="$pretrained" bash scripts/v1_5/pretrain.sh --seed "$SEED"
step sft-dense env OUTPUT="$dense" PROJECTOR="$pretrained/mm_projector.bin" bash scripts/v1_5/finetune.sh --seed "$SEED"
step sft-skip env OUTPUT="$skip" PROJECTOR="$pretrained/mm_projector.bin" bash scripts/v1_5/finetune_skip.sh --seed "$SEED"

evaluate() { llava-sv eval --task toy --data-path "$data" --model-path "$1" --json "$work/$2.json" "${@:3}"; }
step eval-dense evaluate "$dense" dense --timing 6
step eval-skip evaluate "$skip" skip --timing 6
step eval-blind evaluate "$skip" blind --blind

image="$data/images/bench-000000.jpg"
python -m llava_sv.eval.report --dense "$work/dense.json" --skip "$work/skip.json" --blind "$work/blind.json" \
    --image "$image" --seed "$SEED" --output "$report"

echo "[$((SECONDS - started)) s] report: $report/report.md, $report/report.png, $report/patches.png, $report/report.json"
echo
echo "Chat with it:"
[ -n "${LLAVA_SV_NO_VENV:-}" ] || echo "  . .venv/bin/activate"
echo "  llava-sv chat --model-path $skip --image-file $image"
