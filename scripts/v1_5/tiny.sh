# PRESET=tiny: every default swapped for the embedded tiny models and the toy data, on CPU. Sourced by common.sh.

: "${LLM:=playground/tiny/llm}" "${VISION_TOWER:=playground/tiny/clip}"
: "${IMAGE_FOLDER:=playground/data/toy/images}"
: "${NPROC:=1}" "${USE_CPU:=1}" "${DEEPSPEED:=}" "${WORKERS:=0}" "${SAVE_STEPS:=200}" "${MAX_LENGTH:=512}" "${CHECKPOINTING:=False}"

case "$(basename "$0" .sh)" in
    pretrain)
        : "${DATA:=playground/data/toy/pretrain.json}" "${OUTPUT:=checkpoints/tiny-pretrain}"
        : "${BATCH:=32}" "${PER_DEVICE_BATCH:=32}" "${EPOCHS:=1}" "${LR:=1e-3}"
        ;;
    *)
        : "${DATA:=playground/data/toy/sft.json}" "${OUTPUT:=checkpoints/tiny-$(basename "$0" .sh)}"
        : "${ADAPTER:=checkpoints/tiny-pretrain/mm_projector.bin}" "${VERSION:=llama_3}"
        : "${BATCH:=32}" "${PER_DEVICE_BATCH:=32}" "${EPOCHS:=1}" "${LR:=1e-3}"
        : "${NUM_RETAINED:=16}" "${NUM_SKIPPED:=16}"
        ;;
esac
