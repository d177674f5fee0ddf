#!/usr/bin/env bash
# Everything that needs a GPU, in one call: kernels' parity, `bench train` and `bench infer` at real width for the three
# families, the memory plan against measured peaks; a table and JSON in DIR. Within 10 minutes on one card of 80 GB.
#   bash scripts/gpu_check.sh --out DIR
# Runs from this tree: nothing needs to be installed but torch and transformers, and there need be no network.
# --help lists the flags. Environment: PYTHON (default python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m llava_sv.bench.gpu_check "$@"
