#!/usr/bin/env bash
# Supervised fine-tuning with Skip-Vision and LoRA: adapters on the language model train, and the projector in full.
# LLaVA-1.5's LoRA recipe: rank 128, alpha 256, learning rate 2e-4, projector 2e-5, batch 128, ZeRO-3, bf16, 8 GPUs.
#   bash scripts/v1_5/finetune_skip_lora.sh                          the real run
#   PRESET=tiny bash scripts/v1_5/finetune_skip_lora.sh              the embedded tiny models, on CPU
#   BITS=4 bash scripts/v1_5/finetune_skip_lora.sh                   QLoRA: the language model in 4 bits, ZeRO-2
#   LORA_WEIGHTS=checkpoints/a bash scripts/v1_5/finetune_skip_lora.sh   from the adapters and projector of a LoRA run
# LORA_R, LORA_ALPHA, PROJECTOR_LR: rank, alpha, the projector's rate. OUTPUT holds the adapters, never their base.
# Starts from the projector that pretrain.sh left (ADAPTER). The same command resumes an interrupted run.
source "$(dirname "$0")/../common.sh"

: "${LLM:=meta-llama/Meta-Llama-3-8B-Instruct}"
: "${VISION_TOWER=openai/clip-vit-large-patch14-336}"
: "${ADAPTER=checkpoints/llava-sv-llama-3-8b-pretrain/mm_projector.bin}"
: "${DATA:=playground/data/llava_v1_5_mix665k.json}"
: "${IMAGE_FOLDER:=playground/data}"
: "${BITS:=16}"
if [[ "$BITS" == 16 ]]; then
    : "${OUTPUT:=checkpoints/llava-sv-llama-3-8b-skip-100-156-lora}"
    : "${DEEPSPEED=scripts/zero3.json}"
else
    : "${OUTPUT:=checkpoints/llava-sv-llama-3-8b-skip-100-156-qlora-$BITS}"
    : "${DEEPSPEED=scripts/zero2.json}"
fi
: "${VERSION:=llama_3}"
: "${BATCH:=128}" "${PER_DEVICE_BATCH:=16}" "${EPOCHS:=1}" "${LR:=2e-4}" "${MAX_LENGTH:=2048}"
: "${NUM_RETAINED:=100}" "${NUM_SKIPPED:=156}"
: "${LORA_R:=128}" "${LORA_ALPHA:=256}" "${PROJECTOR_LR:=2e-5}" "${LORA_WEIGHTS:=}"

common_flags
FLAGS+=(--lora_enable True --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" --mm_projector_lr "$PROJECTOR_LR" --bits "$BITS")
if [[ -n "$LORA_WEIGHTS" ]]; then
    FLAGS+=(--lora_weight_path "$LORA_WEIGHTS")
else
    FLAGS+=(${ADAPTER:+--pretrain_mm_mlp_adapter "$ADAPTER"})
fi
FLAGS+=(--group_by_modality_length True)
FLAGS+=(--sv_num_retained "$NUM_RETAINED" --sv_num_skipped "$NUM_SKIPPED" --sv_merge True)
launch "$@"
