#!/usr/bin/env bash
# LLaVA-HD, pretraining: the projector alone learns to speak to the language model, from captions; dense, nothing skips.
# The recipe of the LLaVA family, on overviews only; HD_MAX_TILES=4 MAX_LENGTH=3500 pretrains on tiles too, for up to five
# times the tokens, and so does ASPECT_RATIO=anyres MAX_LENGTH=3500, as LLaVA-NeXT cuts them.
#   bash scripts/v1_5_hd/pretrain.sh                          the real run
#   PRESET=tiny bash scripts/v1_5_hd/pretrain.sh              the embedded tiny models, on CPU
# Leaves OUTPUT/mm_projector.bin, which fine-tuning starts from; the LLaVA family's projector will do as well.
# The same command resumes an interrupted run.
MM_FAMILY=llava_hd
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
: "${IMAGE_FOLDER:=playground/data/LLaVA-Pretrain/images}"
: "${OUTPUT:=checkpoints/llava-sv-hd-llama-3-8b-pretrain}"
: "${VERSION:=plain}"
: "${BATCH:=256}" "${PER_DEVICE_BATCH:=32}" "${EPOCHS:=1}" "${LR:=1e-3}" "${MAX_LENGTH:=2048}"
: "${DEEPSPEED=scripts/zero2.json}"
: "${HD_MAX_TILES:=1}"

common_flags
FLAGS+=(--tune_mm_mlp_adapter True)
# anyres chooses among resolutions instead
if [[ "$ASPECT_RATIO" != anyres ]]; then FLAGS+=(--hd_max_tiles "$HD_MAX_TILES"); fi
launch "$@"
