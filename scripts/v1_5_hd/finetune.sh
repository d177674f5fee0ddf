#!/usr/bin/env bash
# LLaVA-HD, supervised fine-tuning, dense: 576 tokens of the overview and 576 of each tile go through every layer. The
# baseline that skipping is held against. LLaVA-665K, one epoch, batch 128, learning rate 1e-5, ZeRO-3, bf16, 8 GPUs.
#   bash scripts/v1_5_hd/finetune.sh                          the real run
#   PRESET=tiny bash scripts/v1_5_hd/finetune.sh              the embedded tiny models, on CPU
#   ASPECT_RATIO=anyres bash scripts/v1_5_hd/finetune.sh      tiles chosen and laid out as LLaVA-NeXT does
# Starts from the projector that pretrain.sh left (ADAPTER). The same command resumes an interrupted run.
MM_FAMILY=llava_hd
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${ADAPTER=checkpoints/llava-sv-hd-llama-3-8b-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}"
: "${IMAGE_FOLDER:=playground/data}"
: "${OUTPUT:=checkpoints/llava-sv-hd-llama-3-8b-dense}"
: "${VERSION:=llama_3}"
: "${BATCH:=128}" "${PER_DEVICE_BATCH:=4}" "${EPOCHS:=1}" "${LR:=1e-5}" "${MAX_LENGTH:=3500}"
: "${DEEPSPEED=scripts/zero3.json}"
: "${HD_MAX_TILES:=4}"

common_flags
FLAGS+=(${ADAPTER:+--pretrain_mm_mlp_adapter "$ADAPTER"} --group_by_modality_length True)
# anyres chooses among resolutions instead
if [[ "$ASPECT_RATIO" != anyres ]]; then FLAGS+=(--hd_max_tiles "$HD_MAX_TILES"); fi
launch "$@"
