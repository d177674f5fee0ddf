#!/usr/bin/env bash
# CoS (Chain-of-Sight), pretraining: the multi-scale resampler alone learns, with 80 tokens an image at 224 pixels; dense.
# The paper's data are 65M image-text pairs: a LLaVA JSON of them in DATA. Until you have one, LLaVA-558K is the default.
# One epoch, batch 256, learning rate 1e-3, ZeRO-2, bf16, 8 GPUs.
#   bash scripts/cos/pretrain.sh                          the real run
#   PRESET=tiny bash scripts/cos/pretrain.sh              the embedded tiny models, on CPU
# Leaves OUTPUT/mm_projector.bin, which fine-tuning scales up to more tokens. The same command resumes an interrupted run.
MM_FAMILY=cos
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14}"
: "${DATA:=playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
: "${IMAGE_FOLDER:=playground/data/LLaVA-Pretrain/images}"
: "${OUTPUT:=checkpoints/llava-sv-cos-llama-3-8b-pretrain}"
: "${VERSION:=plain}"
: "${BATCH:=256}" "${PER_DEVICE_BATCH:=32}" "${EPOCHS:=1}" "${LR:=1e-3}" "${MAX_LENGTH:=2048}"
: "${DEEPSPEED=scripts/zero2.json}"
: "${PROJECTOR:=cos_80}"

common_flags
FLAGS+=(--tune_mm_mlp_adapter True)
launch "$@"
