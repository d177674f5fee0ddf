#!/usr/bin/env bash
# Build what users install, put it into a fresh environment outside of the repository, and use it there: version, doctor,
# the Auto classes, and a question to a checkpoint, whose answer must be the one that this tree gives.
#   bash scripts/check_package.sh                     the wheel, then the source distribution
#   bash scripts/check_package.sh --wheel             one of them; --sdist the other
#   bash scripts/check_package.sh --out dist          keep what was built there
#   bash scripts/check_package.sh --checkpoint checkpoints/tiny-skip --image photo.jpg --prompt "What is this?"
# Without --checkpoint it is playground/zoo/tiny-llava-skip, the quickstart's, or random weights; --types runs mypy too.
# Environment: PYTHON (has this project's packages; default: .venv's), TORCH_INDEX_URL (as for scripts/setup.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

fail() { echo "check_package: $*" >&2; exit 2; }
say() { echo "check_package: $*"; }

kinds=() checkpoint="" image="" prompt="What colour is the shape at the top left?" out="" types=0
while [ $# -gt 0 ]; do
    case "$1" in
        --wheel|--sdist) kinds+=("${1#--}"); shift ;;
        --types) types=1; shift ;;
        --checkpoint|--image|--prompt|--out) [ $# -ge 2 ] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        -h|--help) sed -n '2,9s/^# \{0,1\}//p' scripts/check_package.sh; exit 0 ;;
        *) fail "unknown option '$1'; known: --wheel, --sdist, --checkpoint DIR, --image FILE, --prompt TEXT, --out DIR, --types, --help" ;;
    esac
done
[ ${#kinds[@]} -gt 0 ] || kinds=(wheel sdist)
[ -z "$checkpoint" ] || [ -f "$checkpoint/config.json" ] || fail "--checkpoint $checkpoint: no config.json there; name a checkpoint folder"
[ -z "$image" ] || [ -f "$image" ] || fail "--image $image: no such file"
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi
"$PYTHON" -c 'import torch, transformers' 2>/dev/null || fail "$PYTHON lacks torch or transformers: bash scripts/setup.sh, or name an interpreter that has them: PYTHON=..."

tree=$PWD work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset PYTHONPATH

# --- what is asked, and what this tree answers -----------------------------------------------------------------------
if [ -z "$checkpoint" ]; then
    for checkpoint in playground/zoo/tiny-llava-skip checkpoints/tiny-skip ""; do
        [ ! -f "$checkpoint/config.json" ] || break
    done
fi
mkdir "$work/elsewhere"
if [ -n "$checkpoint" ]; then
    say "asking $checkpoint"
    cp -rL "$checkpoint" "$work/elsewhere/model"
else
    say "asking random weights"
    "$PYTHON" -m tests.checkpoints "$work/elsewhere/model" >/dev/null
fi
if [ -n "$image" ]; then
    cp "$image" "$work/elsewhere/image"
else
    "$PYTHON" -m llava_sv.cli data toy --output "$work/toy" --train 2 --bench 6 --fine-train 0 --fine-bench 0 >/dev/null
    cp "$work/toy/images/bench-000000.jpg" "$work/elsewhere/image"
fi
question=(chat --model-path model --image-file image --prompt "$prompt" --max-new-tokens 32 --device cpu)
expected=$(cd "$work/elsewhere" && PYTHONPATH=$tree "$PYTHON" -m llava_sv.cli "${question[@]}" 2>"$work/log") || { cat "$work/log" >&2; fail "this tree does not answer"; }
version=$("$PYTHON" -m llava_sv.cli --version)
torch=$("$PYTHON" -c 'import torch; print(torch.__version__)')

# --- build, from a copy: a build leaves files beside what it reads ---------------------------------------------------
mkdir "$work/source" "$work/built"
if [ -e .git ]; then
    git ls-files -z --cached --others --exclude-standard | sort -zu | while IFS= read -r -d '' file; do
        [ ! -e "$file" ] || printf '%s\0' "$file"
    done | tar -c --null -T - | tar -x -C "$work/source"
else
    tar -c --exclude ./.venv --exclude ./checkpoints --exclude ./runs --exclude ./build --exclude ./dist . | tar -x -C "$work/source"
fi

build() {  # build KIND: its path on stdout
    case "$1" in
        wheel) "$env/bin/pip" -q wheel --no-deps -w "$work/built" "$work/source" >&2 ;;
        sdist)
            "$env/bin/pip" -q install "setuptools>=77" >&2
            (cd "$work/source" && "$env/bin/python" -c "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])" "$work/built") >"$work/log" 2>&1 || { cat "$work/log" >&2; return 1; } ;;
    esac
    case "$1" in wheel) ls "$work"/built/*.whl ;; sdist) ls "$work"/built/*.tar.gz ;; esac
}

# --- in the fresh environment ----------------------------------------------------------------------------------------
cat >"$work/look.py" <<'PY'
import importlib.metadata, pathlib, sys
import llava_sv, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

home = pathlib.Path(llava_sv.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"imported from {home}"
assert (home.parent / "py.typed").is_file(), "py.typed is not installed"
assert importlib.metadata.version("llava-sv") == llava_sv.__version__
assert AutoConfig.from_pretrained("model").model_type.startswith("llava")
tokenizer, model = AutoTokenizer.from_pretrained("model"), AutoModelForCausalLM.from_pretrained("model")
with torch.no_grad():
    assert model(**tokenizer("a plain question", return_tensors="pt")).logits.isfinite().all()
print(f"{type(model).__name__} by the Auto classes")
PY

check() {  # check KIND
    local kind=$1 begun=$SECONDS built answer packages
    env=$work/env-$kind
    "$PYTHON" -m venv "$env"
    built=$(build "$kind") || fail "the $kind does not build"
    local built_after=$((SECONDS - begun))
    local from=()
    [ -z "${TORCH_INDEX_URL:-}" ] || from=(--index-url "$TORCH_INDEX_URL")
    "$env/bin/pip" -q install "${from[@]}" "torch==$torch" 2>/dev/null || "$env/bin/pip" -q install "${from[@]}" "torch==${torch%+*}"
    local torch_after=$((SECONDS - begun))
    "$env/bin/pip" -q install "$built"
    "$env/bin/pip" check
    local installed_after=$((SECONDS - begun))
    packages=$("$env/bin/pip" list --format freeze | cut -d= -f1)
    ! grep -qixE 'torchvision|torchaudio|timm' <<<"$packages" || fail "$kind: a plain install brings torchvision, torchaudio or timm"
    pushd "$work/elsewhere" >/dev/null
    [ "$("$env/bin/llava-sv" --version)" = "$version" ] || fail "$kind: --version says $("$env/bin/llava-sv" --version), this tree $version"
    "$env/bin/llava-sv" doctor >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "$kind: doctor finds something missing"; }
    "$env/bin/python" "$work/look.py" 2>"$work/log" || { cat "$work/log" >&2; fail "$kind: the Auto classes do not load it"; }
    answer=$("$env/bin/llava-sv" "${question[@]}" 2>"$work/log") || { cat "$work/log" >&2; fail "$kind: chat ended in an error"; }
    [ "$answer" = "$expected" ] || fail "$kind: chat answers '$answer', this tree '$expected'"
    popd >/dev/null
    if [ "$types" = 1 ]; then
        printf '%s\n' 'from llava_sv.constants import GIB' 'reveal_type(GIB)' >"$work/elsewhere/typed.py"
        (cd "$work/elsewhere" && "$PYTHON" -m mypy --python-executable "$env/bin/python" typed.py) >"$work/log" 2>&1 || true
        grep -q 'Revealed type is "int"' "$work/log" || { cat "$work/log" >&2; fail "$kind: mypy sees no types of the installed package"; }
        say "$kind: mypy sees its types"
    fi
    say "$kind: $(basename "$built"), $(($(wc -c <"$built") / 1024)) KiB; built in $built_after s, torch $((torch_after - built_after)) s, the rest $((installed_after - torch_after)) s, used in $((SECONDS - begun - installed_after)) s; answer: $answer"
    [ -z "$out" ] || { mkdir -p "$out"; cp "$built" "$out/"; }
    rm -rf "$env"
}

for kind in "${kinds[@]}"; do check "$kind"; done
say "good: $version"
