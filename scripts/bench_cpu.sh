#!/usr/bin/env bash
# Every timing of docs/Benchmarks.md at size cpu, in one call: training steps and answers of the three families, decoding
# where the cache dominates, a sweep over batches and lengths; ends with the tables. For a quiet machine; one thread.
#   bash scripts/bench_cpu.sh
# Environment: OUT (default runs/bench_cpu), SIZE (default cpu), FAMILIES (default: all three), REPEATS (default: the
# size's; the long runs and the sweep: 5), SWEEP=0 to leave the sweep out, LONG=0 to leave the long runs out, PYTHON.
# A sweep that was stopped goes on where it stood; all else is measured again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    "") ;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' scripts/bench_cpu.sh; exit 0 ;;
    *) echo "bench_cpu: unknown option '$1'; known: --help" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
out=${OUT:-runs/bench_cpu}
size=${SIZE:-cpu}
families=${FAMILIES:-llava llava_hd cos}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$out"
failed=0
trap 'echo interrupted >&2; exit 130' INT # also where the interrupt missed the process that was starting

bench() { # what, name of the result, flags
    local what=$1 result="$out/$2"
    shift 2
    echo "== bench $what $* =="
    "$python" -m "llava_sv.bench.$what" --device cpu --dtype bf16 --overwrite --json "$result.json" "$@" \
        2>"$result.err" || { tail -n 5 "$result.err"; rm -f "$result.json"; failed=1; } # an older one is no result of it
}

for family in $families; do
    bench train "train-$size-$family" --size "$size" --family "$family" ${REPEATS:+--repeats "$REPEATS"}
    bench infer "infer-$size-$family" --size "$size" --family "$family" --new-tokens 16,64,256 ${REPEATS:+--repeats "$REPEATS"}
done

if [ "${LONG:-1}" = 1 ]; then
    # eight samples of 2,880 visual tokens: the dense cache outweighs the weights; and 4,096 tokens of text, which no
    # setting skips
    bench infer "infer-$size-cache" --size "$size" --family llava_hd --batch 8 --new-tokens 64 --repeats "${REPEATS:-5}" --no-peers
    bench infer "infer-$size-text" --size "$size" --batch 1 --text-tokens 4096 --new-tokens 64 --repeats "${REPEATS:-5}" --no-peers
fi

if compgen -G "$out/*-$size-*.json" >/dev/null; then
    echo "== tables =="
    "$python" -m llava_sv.bench.table "$out"/*-"$size"-*.json | tee "$out/table.md"
fi

if [ "${SWEEP:-1}" = 1 ]; then
    echo "== sweep =="
    "$python" -m llava_sv.bench.sweep --size "$size" --device cpu --dtype bf16 --batch 1,8 --text-tokens 64,512 \
        --new-tokens 16,64,256 --repeats "${REPEATS:-5}" --no-peers --json "$out/sweep.json" --markdown "$out/sweep.md" \
        --png "$out/sweep.png" || failed=1
fi
exit "$failed"
