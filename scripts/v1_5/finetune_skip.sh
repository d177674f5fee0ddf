#!/usr/bin/env bash
# Supervised fine-tuning with Skip-Vision: 100 retained and 156 merged, skipped tokens an image instead of 576.
# LLaVA-665K, one epoch, batch 128, learning rate 1e-5, ZeRO-3, bf16, 8 GPUs.
#   bash scripts/v1_5/finetune_skip.sh                          the real run
#   PRESET=tiny bash scripts/v1_5/finetune_skip.sh              the embedded tiny models, on CPU
#   LR=2e-5 bash scripts/v1_5/finetune_skip.sh                  LLaVA-1.5's learning rate
#   NUM_RETAINED=auto bash scripts/v1_5/finetune_skip.sh        as many retained as each image asks for, 100 on average
# Starts from the projector that pretrain.sh left (ADAPTER). The same command resumes an interrupted run.
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${ADAPTER=checkpoints/llava-sv-llama-3-8b-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}"
: "${IMAGE_FOLDER:=playground/data}"
: "${OUTPUT:=checkpoints/llava-sv-llama-3-8b-skip-100-156}"
: "${VERSION:=llama_3}"
: "${BATCH:=128}" "${PER_DEVICE_BATCH:=16}" "${EPOCHS:=1}" "${LR:=1e-5}" "${MAX_LENGTH:=2048}"
: "${DEEPSPEED=scripts/zero3.json}"
: "${NUM_RETAINED:=100}" "${NUM_SKIPPED:=156}"

common_flags
FLAGS+=(${ADAPTER:+--pretrain_mm_mlp_adapter "$ADAPTER"} --group_by_modality_length True)
FLAGS+=(--sv_num_retained "$NUM_RETAINED" --sv_num_skipped "$NUM_SKIPPED" --sv_merge True)
launch "$@"
