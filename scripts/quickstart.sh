#!/usr/bin/env bash
# From a fresh clone to a trained Skip-Vision model and a report, on a CPU, in minutes. Run again, it goes on where it
# stopped. Another seed draws other data and trains other models, in folders of their own.
#   bash scripts/quickstart.sh               everything, into playground/quickstart/report.{md,json,png}
#   SEED=2 bash scripts/quickstart.sh        the same with another seed
#   bash scripts/quickstart.sh --fresh       forget what this seed has made, and start over
# Environment: SEED (1), REPORT (folder of the report), LLAVA_SV_NO_VENV=1 (use the active environment), TOY_TRAIN and
# TOY_BENCH (images, questions), and whatever scripts/v1_5/*.sh read.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

source scripts/steps.sh
options "$@"
check_seed

suffix=""
[ "$SEED" = 1 ] || suffix="-seed$SEED"
data="playground/data/toy$suffix"
pretrained="checkpoints/tiny$suffix-pretrain"
dense="checkpoints/tiny$suffix-dense"
skip="checkpoints/tiny$suffix-skip"
report=${REPORT:-playground/quickstart}
work="$report/seed$SEED"
[ "$fresh" = 0 ] || rm -rf "$data" "$pretrained" "$dense" "$skip" "$work"
mkdir -p "$work"

started=$SECONDS
prepare_environment

step data "" "$data" \
    llava_sv data toy --output "$data" --seed "$SEED" --fine-train 0 --fine-bench 0 ${TOY_TRAIN:+--train "$TOY_TRAIN"} ${TOY_BENCH:+--bench "$TOY_BENCH"}

export PRESET=tiny IMAGE_FOLDER="$data/images" ADAPTER="$pretrained/mm_projector.bin"
step pretrain "$data/pretrain.json" "$pretrained" \
    env DATA="$data/pretrain.json" OUTPUT="$pretrained" bash scripts/v1_5/pretrain.sh
step sft-dense "$ADAPTER" "$dense" env DATA="$data/sft.json" OUTPUT="$dense" bash scripts/v1_5/finetune.sh
step sft-skip "$ADAPTER" "$skip" env DATA="$data/sft.json" OUTPUT="$skip" bash scripts/v1_5/finetune_skip.sh

export OMP_NUM_THREADS=$threads_for_answers
evaluate() { llava_sv eval --task toy --data-path "$data" --model-path "$1" --json "$work/$2.json" "${@:3}"; }
step eval-dense "$dense/config.json" "$work/dense.json" evaluate "$dense" dense
step eval-skip "$skip/config.json" "$work/skip.json" evaluate "$skip" skip
step eval-blind "$skip/config.json" "$work/blind.json" evaluate "$skip" blind --blind
step timing "$skip/config.json" "$work/timing.json" \
    "$PYTHON" -m llava_sv.eval.timing --dense "$dense" --skip "$skip" --task toy --data-path "$data" --json "$work/timing.json"
step flops "$skip/config.json" "$work/flops.json" llava_sv flops --model-path "$skip" --text-tokens 32 --overwrite --json "$work/flops.json"

image="$data/images/bench-000000.jpg"
"$PYTHON" -m llava_sv.eval.report --dense "$work/dense.json" --skip "$work/skip.json" --blind "$work/blind.json" \
    --timing "$work/timing.json" --flops "$work/flops.json" --image "$image" --seed "$SEED" --output "$report"

echo "[$((SECONDS - started)) s] report: $report/report.md, $report/report.png, $report/patches.png, $report/report.json"
echo
echo "Chat with it:"
[ -n "${LLAVA_SV_NO_VENV:-}" ] || echo "  . .venv/bin/activate"
echo "  llava-sv chat --model-path $skip --image-file $image"
