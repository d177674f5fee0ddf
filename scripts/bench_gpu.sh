#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the GPU tests, the memory plan against measured peaks, then both benchmarks on
# LLaMA-3-8B's shapes; ends with a table.
#   bash scripts/bench_gpu.sh
# Environment: OUT (default runs/bench_gpu), SIZES (default "gpu-8b-4layers gpu-8b"), FAMILIES (default: all three),
# REPEATS, PYTHON, DEVICE (default cuda), TESTS=0 to leave the tests out, MEMORY_EVERY (each so many-th run of the memory
# plan's; default 6, 0: none).
# gpu-8b needs one GPU of 80 GB; for less, SIZES=gpu-8b-4layers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    "") ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' scripts/bench_gpu.sh; exit 0 ;;
    *) echo "bench_gpu: unknown option '$1'; known: --help" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
out=${OUT:-runs/bench_gpu}
sizes=${SIZES:-gpu-8b-4layers gpu-8b}
families=${FAMILIES:-llava llava_hd cos}
device=${DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
mkdir -p "$out"

if [ "$device" = cuda ]; then
    "$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "error: no CUDA GPU is usable here")'
fi
failed=0

if [ "${TESTS:-1}" = 1 ]; then
    echo "== tests =="
    "$python" -m pytest -q -p no:cacheprovider tests/model tests/parity tests/bench 2>&1 | tee "$out/tests.txt" | tail -n 5 ||
        failed=1
    "$python" -m pytest -q -p no:cacheprovider -m gpu tests/train 2>&1 | tee "$out/tests-train.txt" | tail -n 5 || failed=1
fi

if [ "${MEMORY_EVERY:=6}" != 0 ]; then
    echo "== memory, planned and measured =="
    mkdir -p "$out/memory"
    "$python" -m llava_sv.bench.memory --device "$device" --every "$MEMORY_EVERY" --json "$out/memory/$device.json" \
        2>"$out/memory/$device.err" | tee "$out/memory/$device.md" || { tail -n 5 "$out/memory/$device.err"; failed=1; }
fi

for size in $sizes; do
    for family in $families; do
        for what in train infer; do
            echo "== bench $what, $size, $family =="
            result="$out/$what-$size-$family"
            "$python" -m "llava_sv.bench.$what" --size "$size" --family "$family" --device "$device" --dtype bf16 --overwrite \
                ${REPEATS:+--repeats "$REPEATS"} --json "$result.json" 2>"$result.err" || { tail -n 5 "$result.err"; failed=1; }
        done
    done
done

echo "== table =="
"$python" -m llava_sv.bench.table "$out"/*.json | tee "$out/table.md"
exit "$failed"
