# PRESET=tiny: every default swapped for the embedded tiny models and the toy data, on CPU. Sourced by common.sh.

: "${LLM:=playground/tiny/llm}" "${VISION_TOWER:=playground/tiny/clip}"
: "${IMAGE_FOLDER:=playground/data/toy/images}"
: "${NPROC:=1}" "${USE_CPU:=1}" "${DEEPSPEED:=}" "${WORKERS:=0}" "${SAVE_STEPS:=200}" "${MAX_LENGTH:=512}" "${CHECKPOINTING:=False}"

script=$(basename "$0" .sh)
case "$script" in
    pretrain)
        : "${DATA:=playground/data/toy/pretrain.json}" "${OUTPUT:=checkpoints/tiny-pretrain}"
        : "${BATCH:=32}" "${PER_DEVICE_BATCH:=32}" "${EPOCHS:=1}" "${LR:=2e-3}"
        ;;
    *)
        : "${DATA:=playground/data/toy/sft.json}" "${OUTPUT:=checkpoints/tiny-$script}"
        : "${ADAPTER:=checkpoints/tiny-pretrain/mm_projector.bin}" "${VERSION:=llama_3}"
        : "${BATCH:=32}" "${PER_DEVICE_BATCH:=32}" "${EPOCHS:=2}" "${LR:=5e-4}"
        ;;
esac
# of 64 patches an image: by the count of the paper, about a third of the dense work, and three fifths of it
case "$script" in
    finetune_skip) : "${NUM_RETAINED:=16}" "${NUM_SKIPPED:=20}" ;;
    finetune_skip_256) : "${NUM_RETAINED:=28}" ;;
esac

# glibc then keeps the memory that a step frees for the next one: a fifth less time on a CPU; others ignore it
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"
