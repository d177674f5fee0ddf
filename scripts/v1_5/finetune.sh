#!/usr/bin/env bash
# Supervised fine-tuning, dense: every visual token goes through every layer. The baseline that skipping is held against.
# LLaVA-665K, one epoch, batch 128, learning rate 1e-5, ZeRO-3, bf16, 8 GPUs.
#   bash scripts/v1_5/finetune.sh                          the real run
#   PRESET=tiny bash scripts/v1_5/finetune.sh              the embedded tiny models, on CPU
#   LR=2e-5 bash scripts/v1_5/finetune.sh                  LLaVA-1.5's learning rate
# Starts from the projector that pretrain.sh left (ADAPTER). The same command resumes an interrupted run.
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${ADAPTER=checkpoints/llava-sv-llama-3-8b-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}"
: "${IMAGE_FOLDER:=playground/data}"
: "${OUTPUT:=checkpoints/llava-sv-llama-3-8b-dense}"
: "${VERSION:=llama_3}"
: "${BATCH:=128}" "${PER_DEVICE_BATCH:=16}" "${EPOCHS:=1}" "${LR:=1e-5}" "${MAX_LENGTH:=2048}"
: "${DEEPSPEED=scripts/zero3.json}"

common_flags
FLAGS+=(${ADAPTER:+--pretrain_mm_mlp_adapter "$ADAPTER"} --group_by_modality_length True)
launch "$@"
