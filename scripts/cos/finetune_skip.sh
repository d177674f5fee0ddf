#!/usr/bin/env bash
# CoS (Chain-of-Sight), supervised fine-tuning with Skip-Vision: the global 16 and middle 256 tokens are retained, the 1024
# of the smallest windows are merged to 256 and skipped; at 448 pixels, and the encoder trains too.
# LLaVA-665K, one epoch, batch 128, learning rate 1e-5, ZeRO-3, bf16, 8 GPUs.
#   bash scripts/cos/finetune_skip.sh                          the real run
#   PRESET=tiny bash scripts/cos/finetune_skip.sh              the embedded tiny models, on CPU
#   DATA=playground/data/mixtures/sv-1m bash scripts/cos/finetune_skip.sh  what llava-sv data mix sv-1m made
#   PROJECTOR=cos_336 bash scripts/cos/finetune_skip.sh            16 + 64 retained, 256 merged to 64 and skipped
# Starts from the projector that pretrain.sh left (ADAPTER), scaled up. The same command resumes an interrupted run.
MM_FAMILY=cos
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14}"
: "${ADAPTER=checkpoints/llava-sv-cos-llama-3-8b-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}"
: "${IMAGE_FOLDER:=playground/data}"
: "${OUTPUT:=checkpoints/llava-sv-cos-llama-3-8b-skip-272-256}"
: "${VERSION:=llama_3}"
: "${BATCH:=128}" "${PER_DEVICE_BATCH:=16}" "${EPOCHS:=1}" "${LR:=1e-5}" "${MAX_LENGTH:=2048}"
: "${DEEPSPEED=scripts/zero3.json}"
: "${PROJECTOR:=cos_1296}" "${IMAGE_SIZE:=448}" "${TOWER_LR:=$LR}" "${TOWER_LR_DECAY:=1.0}"
if [[ "$PROJECTOR" == cos_1296 ]]; then : "${NUM_RETAINED:=272}" "${NUM_SKIPPED:=256}"; fi

common_flags
FLAGS+=(${ADAPTER:+--pretrain_mm_mlp_adapter "$ADAPTER"} --group_by_modality_length True --mm_vision_image_size "$IMAGE_SIZE")
FLAGS+=(--unfreeze_mm_vision_tower True --mm_vision_tower_lr "$TOWER_LR" --mm_vision_tower_lr_decay "$TOWER_LR_DECAY")
FLAGS+=(--sv_merge True)
# without them: all scales but the finest are retained, which is merged to a quarter
if [[ -n "${NUM_RETAINED:-}" ]]; then FLAGS+=(--sv_num_retained "$NUM_RETAINED"); fi
if [[ -n "${NUM_SKIPPED:-}" ]]; then FLAGS+=(--sv_num_skipped "$NUM_SKIPPED"); fi
launch "$@"
