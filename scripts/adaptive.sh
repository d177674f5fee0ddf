#!/usr/bin/env bash
# Budgets that follow the content (num_retained: auto) against a fixed budget of the same average FLOPs: tiny models, the
# toy benchmark with fine detail, three seeds, on a CPU. Run again, it goes on where it stopped.
#   bash scripts/adaptive.sh                      16 + 20 of 64 patches, into playground/adaptive/16+20/ablation.{md,json,png}
#   BUDGET=6+8 EPOCHS=1 bash scripts/adaptive.sh  a budget that binds, trained half as long
#   DRY_RUN=1 bash scripts/adaptive.sh            every command, none of them run
# Environment: BUDGET (16+20: retained on average + skipped), OUTPUT (playground/adaptive/BUDGET), SEEDS ("1 2 3"),
# SELECTION (what scores patches), ADAPTER (a pretrained projector: nothing is pretrained then), and all that
# scripts/ablation.sh reads (DATA IMAGE_FOLDER BENCH EPOCHS ...).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' scripts/adaptive.sh
    exit 0
fi

BUDGET=${BUDGET:-16+20}
if ! [[ "$BUDGET" =~ ^([1-9][0-9]*)\+([1-9][0-9]*)$ ]]; then
    echo "adaptive: BUDGET=$BUDGET: write retained + skipped tokens, such as 16+20" >&2
    exit 2
fi
retained=${BASH_REMATCH[1]} skipped=${BASH_REMATCH[2]}
shared="num_skipped=$skipped${SELECTION:+ selection=$SELECTION}"
export PRESET=tiny FAMILY=llava ROWS="" OUTPUT="${OUTPUT:-playground/adaptive/$BUDGET}"
exec bash scripts/ablation.sh --row "fixed: num_retained=$retained $shared" \
    --row "auto: num_retained=auto retained_mean=$retained $shared" "$@"
