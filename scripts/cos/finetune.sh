#!/usr/bin/env bash
# CoS (Chain-of-Sight), supervised fine-tuning, dense: 16 + 256 + 1024 tokens an image at 448 pixels go through every
# layer; the encoder trains too. The baseline that skipping is held against.
# LLaVA-665K, one epoch, batch 128, learning rate 1e-5, ZeRO-3, bf16, 8 GPUs.
#   bash scripts/cos/finetune.sh                          the real run
#   PRESET=tiny bash scripts/cos/finetune.sh              the embedded tiny models, on CPU
#   PROJECTOR=cos_336 bash scripts/cos/finetune.sh        336 tokens: 16 + 64 + 256
# Starts from the projector that pretrain.sh left (ADAPTER), scaled up. The same command resumes an interrupted run.
MM_FAMILY=cos
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14}"
: "${ADAPTER=checkpoints/llava-sv-cos-llama-3-8b-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}"
: "${IMAGE_FOLDER:=playground/data}"
: "${OUTPUT:=checkpoints/llava-sv-cos-llama-3-8b-dense}"
: "${VERSION:=llama_3}"
: "${BATCH:=128}" "${PER_DEVICE_BATCH:=8}" "${EPOCHS:=1}" "${LR:=1e-5}" "${MAX_LENGTH:=2048}"
: "${DEEPSPEED=scripts/zero3.json}"
: "${PROJECTOR:=cos_1296}" "${IMAGE_SIZE:=448}" "${TOWER_LR:=$LR}" "${TOWER_LR_DECAY:=1.0}"

common_flags
FLAGS+=(${ADAPTER:+--pretrain_mm_mlp_adapter "$ADAPTER"} --group_by_modality_length True --mm_vision_image_size "$IMAGE_SIZE")
FLAGS+=(--unfreeze_mm_vision_tower True --mm_vision_tower_lr "$TOWER_LR" --mm_vision_tower_lr_decay "$TOWER_LR_DECAY")
launch "$@"
