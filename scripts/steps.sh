# Steps that are done once: shared by the scripts that run many commands one after another. Sourced, never run.
# The caller sets `work`, the folder where a finished step leaves its mark, and `started=$SECONDS`.

# step NAME INPUT PRODUCT COMMAND...: a finished step leaves a mark that holds the seconds it took, and is passed over
# later unless INPUT is newer than that mark; then its PRODUCT is made anew. An interrupted step goes on where it was.
step() {
    local name=$1 input=$2 product=$3 begun=$SECONDS mark="$work/$1.done" own
    own=$(basename "$0" .sh)
    shift 3
    if [ -e "$mark" ] && [ -e "$product" ] && ! [ "$input" -nt "$mark" ]; then
        echo "[$((SECONDS - started)) s] $name: done before, in $(cat "$mark") s"
        return
    fi
    [ ! -e "$mark" ] || rm -rf "$mark" "$product"
    echo "[$((SECONDS - started)) s] $name ..."
    "$@" || { local code=$?; echo "$own: $name failed (exit code $code); mend it and run this again: it goes on here (--fresh starts over)" >&2; exit "$code"; }
    echo "$((SECONDS - begun))" >"$mark"
    echo "[$((SECONDS - started)) s] $name took $((SECONDS - begun)) s"
}

# SEED from the environment (1 where there is none), a whole number.
check_seed() {
    export SEED=${SEED:-1}
    case "$SEED" in ''|*[!0-9]*) echo "$(basename "$0" .sh): SEED must be a whole number, got '$SEED'" >&2; exit 2 ;; esac
}

# The environment: .venv, or with LLAVA_SV_NO_VENV=1 the active one; PYTHON and llava_sv run in it.
prepare_environment() {
    if [ -n "${LLAVA_SV_NO_VENV:-}" ]; then
        bash scripts/setup.sh --no-venv
        export PYTHON=${PYTHON:-$(command -v python3 || command -v python)}
    else
        bash scripts/setup.sh
        export PATH="$PWD/.venv/bin:$PATH" PYTHON="$PWD/.venv/bin/python"
    fi
    echo "[$((SECONDS - started)) s] environment ready"
    local cores
    cores=$(nproc 2>/dev/null || echo 2)
    # models this small answer fastest on one core
    threads_for_answers=${OMP_NUM_THREADS:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}
    export TOKENIZERS_PARALLELISM=false
}

llava_sv() { "$PYTHON" -m llava_sv.cli "$@"; }
