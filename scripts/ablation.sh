#!/usr/bin/env bash
# Ablation: rows of the paper's Tables 4, 6 and 7, or rows of your own, trained and scored over several seeds; a table
# and a chart with the paper's numbers beside them, into OUTPUT/ablation.{md,json,png}. Run again, it goes on where it
# stopped. docs/Ablation.md explains the rows.
#   PRESET=tiny FAMILY=llava bash scripts/ablation.sh                       Table 6 with the embedded tiny models, on CPU
#   PRESET=tiny FAMILY=llava ROWS=0,2,10,11 SEEDS=1 MAX_STEPS=20 bash scripts/ablation.sh       a short look
#   PRESET=tiny FAMILY=llava ROWS=11 bash scripts/ablation.sh --row "half: like=11 skip_layers=2-3"
#   PRESET=tiny DRY_RUN=1 bash scripts/ablation.sh                          every command, none of them run
# Environment:
#   FAMILY      llava, llava_hd or cos (default)
#   ROWS        table4, table6, table7, and rows: 0 to 11, middle+small, no-sk, sk (default: table6 table7, without a
#               middle scale table6)
#   SEEDS       training seeds (default: "1 2 3")   OUTPUT   folder (default: playground/ablation/FAMILY)
#   MAX_STEPS   steps of every training             TASK BENCH   benchmark and its folder (tiny: toy, drawn once)
#   EVAL_FLAGS  further flags of llava-sv eval      ADAPTER  a pretrained projector: nothing is pretrained then
#   TOY_TRAIN TOY_BENCH   images and questions of the toy data (PRESET=tiny without DATA)
#   DATA IMAGE_FOLDER BATCH GRAD_ACCUM EPOCHS LR VERSION PROJECTOR HD_MAX_TILES IMAGE_SIZE   for fine-tuning only;
#   PRETRAIN_DATA and so on, all but IMAGE_SIZE, for pretraining
#   and all else that the training scripts read: PRESET LLM NPROC PER_DEVICE_BATCH NUM_RETAINED NUM_SKIPPED DRY_RUN ...
# --row "NAME: SETTINGS" adds a row; any other flag goes to every fine-tuning.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' scripts/ablation.sh
    exit 0
fi

if [[ -z "${PYTHON:=}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi
export TOKENIZERS_PARALLELISM=false
# models this small gain nothing from more
if [[ "${PRESET:-}" == tiny ]]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi

# only what is set: the defaults are the command's own. ROWS and SEEDS may be set to nothing
OPTIONS=(${FAMILY:+--family "$FAMILY"} ${PRESET:+--preset "$PRESET"} ${OUTPUT:+--output "$OUTPUT"})
OPTIONS+=(${ROWS+--rows "$ROWS"} ${SEEDS+--seeds "$SEEDS"} ${MAX_STEPS:+--max-steps "$MAX_STEPS"})
OPTIONS+=(${TASK:+--task "$TASK"} ${BENCH:+--bench "$BENCH"} ${ADAPTER:+--adapter "$ADAPTER"})
OPTIONS+=(${EVAL_FLAGS:+"--eval-flags=$EVAL_FLAGS"})
if [[ "${DRY_RUN:-0}" == 1 ]]; then OPTIONS+=(--dry-run); fi
exec "$PYTHON" -m llava_sv.eval.ablation "${OPTIONS[@]}" "$@"
