#!/usr/bin/env bash
# What the Dockerfile and the Apptainer recipe do inside of the image, so that both make the same one.
#   bash scripts/docker/install.sh system        Ubuntu's packages (as root)
#   bash scripts/docker/install.sh environment   a virtual environment in $VENV with torch and all that training needs
# Environment: VENV (/opt/venv), DEVICE (cuda or cpu), FLASH_ATTN=1 (build flash-attn; many minutes), TORCH_INDEX_URL (where
# to take torch from, if not pip's own index), MAX_JOBS and TORCH_CUDA_ARCH_LIST (read by flash-attn's build).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() { echo "install: $*" >&2; exit 2; }
: "${VENV:=/opt/venv}" "${DEVICE:=cuda}" "${FLASH_ATTN:=0}" "${TORCH_INDEX_URL:=}"
[ "$DEVICE" = cuda ] || [ "$DEVICE" = cpu ] || fail "DEVICE must be cuda or cpu, got '$DEVICE'"
[ "$FLASH_ATTN" = 0 ] || [ "$FLASH_ATTN" = 1 ] || fail "FLASH_ATTN must be 0 or 1, got '$FLASH_ATTN'"
[ "$DEVICE" = cuda ] || [ "$FLASH_ATTN" = 0 ] || fail "FLASH_ATTN=1 needs DEVICE=cuda"

case "${1:-}" in
system)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # a compiler for DeepSpeed's and Triton's kernels; ssh and pdsh for a hostfile; verbs for NCCL over InfiniBand
    apt-get install -y --no-install-recommends ca-certificates git build-essential python3 python3-dev python3-venv \
        libaio-dev openssh-client pdsh ibverbs-providers
    rm -rf /var/lib/apt/lists/*
    ;;
environment)
    export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
    python3 -m venv "$VENV"
    export PATH="$VENV/bin:$PATH" PYTHON="$VENV/bin/python"
    extras=()
    if [ "$DEVICE" = cuda ]; then
        # setup.sh looks for a GPU, and an image is built without one: the CUDA build of torch is put there first
        from=()
        [ -z "$TORCH_INDEX_URL" ] || from=(--index-url "$TORCH_INDEX_URL")
        pip install -q ${from[@]+"${from[@]}"} "torch==$(sed -n 's/^torch==//p' constraints.txt)"
        extras=(--extra train-gpu)
        built_for=$(python -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')
        compiler=$(nvcc --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
        [ "$built_for" = "$compiler" ] || fail "torch is built for CUDA $built_for and this image has CUDA $compiler: choose another BASE_IMAGE or TORCH_INDEX_URL"
    fi
    [ "$FLASH_ATTN" = 0 ] || extras+=(--extra flash)
    bash scripts/setup.sh --no-venv ${extras[@]+"${extras[@]}"}
    llava-sv --version
    ;;
*) fail "say what to install: system or environment" ;;
esac
