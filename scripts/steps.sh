# Steps that are done once: shared by the scripts that run many commands one after another. Sourced, never run.
# The caller calls `options "$@"`, and sets `work`, the folder where a finished step leaves its mark, and
# `started=$SECONDS`.

# options ARGUMENT...: --fresh sets fresh=1 (else 0), --help prints the head of the calling script, others are refused.
options() {
    own=$(basename "$0" .sh) fresh=0
    while (($#)); do
        case "$1" in
            --fresh) fresh=1 ;;
            -h|--help) sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "scripts/$own.sh"; exit 0 ;;
            *) echo "$own: unknown option '$1'; known: --fresh, --help" >&2; exit 2 ;;
        esac
        shift
    done
}

# What of the environment decides what a training makes; the devices that it runs on do not.
TRAINING="LLM VISION_TOWER BATCH GRAD_ACCUM EPOCHS LR MAX_LENGTH VERSION PROJECTOR ASPECT_RATIO IMAGE_SIZE HD_MAX_TILES"
TRAINING+=" NUM_RETAINED NUM_SKIPPED TOWER_LR TOWER_LR_DECAY"

# words_of COMMAND...: its words, one a line; for a script that `env` starts, what it reads of the environment too.
words_of() {
    local name
    if [ "$1" = env ]; then
        for name in $TRAINING; do [ -z "${!name:-}" ] || echo "$name=${!name}"; done
    fi
    for name in "$@"; do [ "$name" = "${PYTHON:-}" ] && echo python || printf '%s\n' "$name"; done
}

# only_first A B: the lines of A that B lacks, in one line.
only_first() { { grep -vxF -e "$2" <<<"$1" || echo "nothing more"; } | paste -sd ' '; }

# step NAME INPUT PRODUCT COMMAND...: a finished step leaves a mark, the seconds it took and then its command, and is
# passed over later unless INPUT is newer than that mark; then its PRODUCT is made anew. Another command is refused: what
# was made is not what is asked for. An interrupted step goes on where it was.
step() {
    local name=$1 input=$2 product=$3 begun=$SECONDS mark="$work/$1.done" now was
    shift 3
    now=$(words_of "$@")
    if [ -e "$mark" ] && [ -e "$product" ] && ! [ "$input" -nt "$mark" ]; then
        was=$(tail -n +2 "$mark")
        if [ -n "$was" ] && [ "$was" != "$now" ]; then
            echo "$own: $name was done by another command (then: $(only_first "$was" "$now"); now: $(only_first "$now" "$was")); set that back, or start over with --fresh" >&2
            exit 2
        fi
        echo "[$((SECONDS - started)) s] $name: done before, in $(head -n 1 "$mark") s"
        return
    fi
    [ ! -e "$mark" ] || rm -rf "$mark" "$product"
    echo "[$((SECONDS - started)) s] $name ..."
    "$@" || { local code=$?; echo "$own: $name failed (exit code $code); mend it and run this again: it goes on here (--fresh starts over)" >&2; exit "$code"; }
    printf '%s\n' "$((SECONDS - begun))" "$now" >"$mark"
    echo "[$((SECONDS - started)) s] $name took $((SECONDS - begun)) s"
}

# SEED from the environment (1 where there is none), a whole number.
check_seed() {
    export SEED=${SEED:-1}
    case "$SEED" in ''|*[!0-9]*) echo "$own: SEED must be a whole number, got '$SEED'" >&2; exit 2 ;; esac
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
