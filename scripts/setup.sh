#!/usr/bin/env bash
# Prepare an environment for llava-sv: from a fresh clone to `llava-sv doctor`. Run again, it sees that nothing is to do.
#   bash scripts/setup.sh                    make .venv in the repository and install into it (CI's exact versions)
#   bash scripts/setup.sh --no-venv          install into the active environment; what it has already stays as it is
#   bash scripts/setup.sh --extra train-gpu  one more extra of pyproject.toml (flash, train-gpu, serve, eval); may repeat
# Environment: PYTHON (the interpreter to start from), TORCH_INDEX_URL (where to take torch from, if not pip's own index).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

fail() { echo "setup: $*" >&2; exit 2; }
say() { echo "setup: $*"; }

use_venv=1
extras=(dev)
while [ $# -gt 0 ]; do
    case "$1" in
        --no-venv) use_venv=0; shift ;;
        --extra) [ $# -ge 2 ] || fail "--extra needs a name: flash, train-gpu, serve or eval"
            case "$2" in
                flash|train-gpu|serve|eval) extras+=("$2") ;;
                dev) ;;
                *) fail "unknown extra '$2'; known: flash, train-gpu, serve, eval" ;;
            esac
            shift 2 ;;
        -h|--help) sed -n '2,6s/^# \{0,1\}//p' scripts/setup.sh; exit 0 ;;
        *) fail "unknown option '$1'; known: --no-venv, --extra NAME, --help" ;;
    esac
done
extras_csv=$(IFS=,; echo "${extras[*]}")

# --- the interpreter -------------------------------------------------------------------------------------------------
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(python3 python python3.13 python3.12 python3.11 python3.10); fi
    for candidate in "${candidates[@]}"; do
        if command -v "$candidate" >/dev/null 2>&1 && new_enough "$candidate"; then echo "$candidate"; return; fi
    done
}
base_python=$(find_python)
[ -n "$base_python" ] || fail "needs Python 3.10 or newer (found: $(python3 -V 2>&1 || true)); install one, or name it: PYTHON=/path/to/python3.11 bash scripts/setup.sh"

if [ "$use_venv" = 1 ]; then
    python="$PWD/.venv/bin/python"
    if ! new_enough "$python" || [ ! -x .venv/bin/pip ]; then  # none, too old, or one whose making was cut short
        say "making .venv with $("$base_python" -V)"
        "$base_python" -m venv --clear .venv || fail "could not make .venv; on Debian and Ubuntu install python3-venv, or use your own environment with --no-venv"
    fi
else
    python=$(command -v "$base_python")
    "$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip; install pip into the active environment"
fi

# --- is there anything to do? ----------------------------------------------------------------------------------------
gpu=cpu
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then gpu=cuda; fi
prefix=$("$python" -c 'import sys; print(sys.prefix)')
stamp="$prefix/.llava-sv-setup"
wanted="$PWD $gpu $extras_csv $(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -e "$prefix/bin/llava-sv" ]; then
    say "up to date ($prefix)"
    exit 0
fi

# --- install ---------------------------------------------------------------------------------------------------------
pip=("$python" -m pip --disable-pip-version-check -qq --no-input install)
installed() { "$python" -c "import importlib.metadata as m, sys; m.version(sys.argv[1])" "$1" >/dev/null 2>&1; }
pin() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt; }

constraints=constraints.txt
if [ "$use_venv" = 0 ]; then
    # Pin only what is missing: an environment that somebody else made keeps its torch, its CUDA and the rest.
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    "$python" - >"$constraints" <<'PY'
import importlib.metadata, re
def key(name): return re.sub(r"[-_.]+", "-", name).lower()
have = {key(d.metadata["Name"]) for d in importlib.metadata.distributions() if d.metadata["Name"]}
for line in open("constraints.txt"):
    if "==" in line and not line.startswith("#") and key(line.split("==")[0]) not in have:
        print(line, end="")
PY
fi

started=$SECONDS
if [ "$use_venv" = 1 ] || ! installed torch; then
    torch="torch==$(pin torch)"
    from=()
    [ -z "${TORCH_INDEX_URL:-}" ] || from=(--index-url "$TORCH_INDEX_URL")
    if [ "$gpu" = cpu ] && ! installed torch; then
        # The CPU build carries the local version +cpu; an index without it offers its only build under the plain version.
        say "installing $torch for CPU (no CUDA GPU found)"
        "${pip[@]}" "${from[@]}" -c "$constraints" "$torch+cpu" 2>/dev/null || "${pip[@]}" "${from[@]}" -c "$constraints" "$torch"
    else
        say "installing $torch"
        "${pip[@]}" "${from[@]}" -c "$constraints" "$torch"
    fi
fi
say "installing build tools and deepspeed"
"${pip[@]}" -c "$constraints" "setuptools>=77" wheel ninja packaging
# deepspeed's own build reads the torch that is there, so it must not be built in isolation.
"${pip[@]}" -c "$constraints" --no-build-isolation "deepspeed>=0.18"
case ",$extras_csv," in *,flash,*)
    say "building flash-attn (many minutes where there is no wheel for this torch)"
    "${pip[@]}" -c "$constraints" --no-build-isolation "flash-attn>=2.7" || fail "flash-attn did not install: it needs a CUDA GPU, nvcc and the CUDA build of torch" ;;
esac
say "installing llava-sv with [$extras_csv]"
"${pip[@]}" -c "$constraints" --no-build-isolation -e ".[$extras_csv]"

if [ "$gpu" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    say "warning: a GPU is there, but this torch is a CPU build; set TORCH_INDEX_URL to an index with CUDA builds, remove torch and run again"
fi
echo "$wanted" >"$stamp" 2>/dev/null || true
say "ready in $((SECONDS - started)) s: $prefix"
[ "$use_venv" = 0 ] || say "activate it with: . .venv/bin/activate"
