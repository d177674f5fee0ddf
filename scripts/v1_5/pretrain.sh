#!/usr/bin/env bash
# Pretraining: the projector alone learns to speak to the language model, from captions; dense, nothing skips.
# The paper's recipe: LLaVA-558K, one epoch, batch 256, learning rate 1e-3, ZeRO-2, bf16, 8 GPUs.
#   bash scripts/v1_5/pretrain.sh                          the real run
#   PRESET=tiny bash scripts/v1_5/pretrain.sh              the embedded tiny models, on CPU
#   LLM=lmsys/vicuna-7b-v1.5 NPROC=4 bash scripts/v1_5/pretrain.sh --max_steps 100
# Leaves OUTPUT/mm_projector.bin, which fine-tuning starts from. The same command resumes an interrupted run.
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${DATA:=playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
: "${IMAGE_FOLDER:=playground/data/LLaVA-Pretrain/images}"
: "${OUTPUT:=checkpoints/llava-sv-llama-3-8b-pretrain}"
: "${VERSION:=plain}"
: "${BATCH:=256}" "${PER_DEVICE_BATCH:=32}" "${EPOCHS:=1}" "${LR:=1e-3}" "${MAX_LENGTH:=2048}"
: "${DEEPSPEED=scripts/zero2.json}"

common_flags
FLAGS+=(--tune_mm_mlp_adapter True)
launch "$@"
