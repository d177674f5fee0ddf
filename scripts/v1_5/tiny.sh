# PRESET=tiny: every default swapped for the embedded tiny models and the toy data, on CPU. Sourced by common.sh.

: "${LLM:=playground/tiny/llm}" "${VISION_TOWER=playground/tiny/clip}"
: "${IMAGE_FOLDER:=playground/data/toy/images}"
: "${NPROC:=1}" "${USE_CPU:=1}" "${DEEPSPEED:=}" "${WORKERS:=0}" "${SAVE_STEPS:=200}" "${CHECKPOINTING:=False}"
: "${BATCH:=32}"
# shared between the processes where they are numbers; what is wrong with them is said later
if [[ "$BATCH" =~ ^[1-9][0-9]*$ && "$NPROC" =~ ^[1-9][0-9]*$ && "${NNODES:-1}" =~ ^[1-9][0-9]*$ ]]; then
    : "${PER_DEVICE_BATCH:=$((BATCH / (NPROC * ${NNODES:-1})))}"
fi
: "${PER_DEVICE_BATCH:=$BATCH}"

script=$(basename "$0" .sh)
case "$MM_FAMILY" in
    llava) name="" ;;
    llava_hd) name="hd-" ;;
    cos) name="cos-" ;;
esac
case "$script" in *_lora) : "${LR:=2e-3}" "${PROJECTOR_LR:=5e-4}" "${LORA_R:=16}" "${LORA_ALPHA:=32}" ;; esac
case "$script" in
    pretrain)
        : "${DATA:=playground/data/toy/pretrain.json}" "${OUTPUT:=checkpoints/tiny-${name}pretrain}"
        : "${EPOCHS:=1}" "${LR:=2e-3}"
        ;;
    *)
        : "${DATA:=playground/data/toy/sft.json}" "${OUTPUT:=checkpoints/tiny-$name$script}"
        : "${ADAPTER=checkpoints/tiny-${name}pretrain/mm_projector.bin}" "${VERSION:=llama_3}"
        : "${EPOCHS:=2}" "${LR:=5e-4}"
        ;;
esac
case "$name$script" in
    # of 64 patches an image: by the count of the paper, about a third of the dense work, and three fifths of it
    finetune_skip | finetune_skip_lora) : "${NUM_RETAINED:=16}" "${NUM_SKIPPED:=20}" ;;
    finetune_skip_256) : "${NUM_RETAINED:=28}" ;;
    # 64 tokens of the overview and 64 of each of up to 4 tiles
    hd-finetune) : "${MAX_LENGTH:=1024}" ;;
    hd-finetune_skip) : "${NUM_RETAINED:=64}" "${NUM_SKIPPED:=64}" "${MAX_LENGTH:=768}" ;;
    # 16 + 64 + 256 tokens at 128 pixels; the encoder, trained apart, moves with care
    cos-finetune*) : "${TOWER_LR:=1e-4}" "${TOWER_LR_DECAY:=0.8}" ;;&
    cos-finetune) : "${PROJECTOR:=cos_336}" "${IMAGE_SIZE:=128}" "${MAX_LENGTH:=1024}" ;;
    cos-finetune_skip) : "${PROJECTOR:=cos_336}" "${IMAGE_SIZE:=128}" "${NUM_RETAINED:=80}" "${NUM_SKIPPED:=64}" "${MAX_LENGTH:=768}" ;;
esac
: "${MAX_LENGTH:=512}"

# glibc then keeps the memory that a step frees for the next one: a fifth less time on a CPU; others ignore it
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"
