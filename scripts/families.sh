#!/usr/bin/env bash
# The three families side by side on the toy benchmark, fine detail included, on a CPU: LLaVA dense and skipping,
# LLaVA-HD and CoS with skipping; trained by the families' own scripts, asked the same questions, set in one report.
# Up to an hour on two cores. Run again, it goes on where it stopped.
#   bash scripts/families.sh                 everything, into playground/families/report.{md,json,png}
#   SEED=2 bash scripts/families.sh          the same with another seed
#   DENSE=1 bash scripts/families.sh         the dense controls of LLaVA-HD and CoS too: twice the time
#   bash scripts/families.sh --fresh         forget what this seed has made, and start over
# Environment: SEED (1), DENSE (0), REPORT (folder of the report), LLAVA_SV_NO_VENV=1 (use the active environment),
# TOY_TRAIN and TOY_BENCH (images, questions of each kind), and whatever the training scripts read.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

source scripts/steps.sh
options "$@"
check_seed
case "${DENSE:=0}" in 0|1) ;; *) echo "families: DENSE must be 0 or 1, got '$DENSE'" >&2; exit 2 ;; esac

data="playground/data/toy-fine-seed$SEED"
made="checkpoints/tiny-families-seed$SEED"
report=${REPORT:-playground/families}
work="$report/seed$SEED"
[ "$fresh" = 0 ] || rm -rf "$data" "$made" "$work"
mkdir -p "$work"

started=$SECONDS
prepare_environment

step data "" "$data" llava_sv data toy --output "$data" --seed "$SEED" \
    ${TOY_TRAIN:+--train "$TOY_TRAIN"} ${TOY_BENCH:+--bench "$TOY_BENCH" --fine-bench "$TOY_BENCH"}

export PRESET=tiny IMAGE_FOLDER="$data/images"
for folder in v1_5 v1_5_hd cos; do
    step "pretrain-$folder" "$data/pretrain.json" "$made/$folder-pretrain" \
        env DATA="$data/pretrain.json" OUTPUT="$made/$folder-pretrain" bash "scripts/$folder/pretrain.sh"
done

# train NAME FOLDER SCRIPT: supervised fine-tuning, then the benchmark and the count of FLOPs
results=()
train() {
    local name=$1 folder=$2 script=$3 adapter="$made/$2-pretrain/mm_projector.bin" threads=$OMP_NUM_THREADS
    step "sft-$name" "$adapter" "$made/$name" \
        env DATA="$data/sft.json" OUTPUT="$made/$name" ADAPTER="$adapter" bash "scripts/$folder/$script.sh"
    export OMP_NUM_THREADS=$threads_for_answers
    step "eval-$name" "$made/$name/config.json" "$work/$name.json" \
        llava_sv eval --task toy --data-path "$data" --model-path "$made/$name" --json "$work/$name.json"
    export OMP_NUM_THREADS=$threads
    results+=(--result "$name=$work/$name.json")
    if [[ "$name" == *-skip ]]; then
        step "flops-$name" "$made/$name/config.json" "$work/$name.flops.json" \
            llava_sv flops --model-path "$made/$name" --text-tokens 32 --overwrite --json "$work/$name.flops.json"
        results+=(--flops "$name=$work/$name.flops.json")
    fi
}

train llava-dense v1_5 finetune
train llava-skip v1_5 finetune_skip
if [ "$DENSE" = 1 ]; then train hd-dense v1_5_hd finetune; fi
train hd-skip v1_5_hd finetune_skip
if [ "$DENSE" = 1 ]; then train cos-dense cos finetune; fi
train cos-skip cos finetune_skip

"$PYTHON" -m llava_sv.eval.families "${results[@]}" --baseline llava-dense --seed "$SEED" --output "$report"
echo "[$((SECONDS - started)) s] report: $report/report.md, $report/report.png, $report/report.json"
