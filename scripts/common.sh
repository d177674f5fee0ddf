# Shared by the training scripts: the tiny preset, the batch arithmetic, the checks before a start, the launcher.
# Sourced, never run. A script sets its defaults with ${NAME:=value}, fills FLAGS and calls `launch "$@"`.
#
# Environment that every training script reads (its own page has the defaults):
#   LLM VISION_TOWER DATA IMAGE_FOLDER ADAPTER OUTPUT   models, data, where results go
#   BATCH PER_DEVICE_BATCH (or auto) GRAD_ACCUM EPOCHS LR MAX_LENGTH SEED VERSION CHECKPOINTING SAVE_STEPS WORKERS
#   NPROC NNODES NODE_RANK MASTER_ADDR MASTER_PORT HOSTFILE   processes a node, nodes, where they meet
#   PROJECTOR ASPECT_RATIO   --mm_projector_type, --image_aspect_ratio
#   DEEPSPEED   DeepSpeed configuration; empty: none       USE_CPU=1   train without a GPU
#   PYTHON      interpreter (default: .venv's, else python)
#   PLAN=1      print what each device's memory must hold, instead of training (docs/Memory.md)
#   DRY_RUN=1   print the command instead of running it    PRESET=tiny   the embedded tiny models, on CPU
# Any further argument is passed on to training: bash scripts/v1_5/finetune.sh --max_steps 10

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
    sed -n '/^# Environment/,/^# Any/s/^# \{0,1\}//p' scripts/common.sh
    exit 0
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

: "${MM_FAMILY:=llava}"
case "${PRESET:=}" in
    "") ;;
    tiny) source scripts/v1_5/tiny.sh ;;
    *) fail "PRESET=$PRESET: unknown preset; known: tiny" ;;
esac

: "${NPROC:=8}" "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}" "${HOSTFILE:=}"
: "${USE_CPU:=0}" "${SEED:=42}" "${DRY_RUN:=0}"
if [[ -z "${PYTHON:=}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi

# How many batches each process accumulates, so that one optimizer step sees BATCH samples on any number of devices.
set_grad_accum() {
    if [[ "$PER_DEVICE_BATCH" == auto ]]; then GRAD_ACCUM=1; return; fi # found as training starts; BATCH is kept
    local together=$((PER_DEVICE_BATCH * NPROC * NNODES))
    if [[ -z "${GRAD_ACCUM:=}" ]]; then
        ((BATCH % together == 0)) || fail "BATCH=$BATCH is no multiple of PER_DEVICE_BATCH=$PER_DEVICE_BATCH x NPROC=$NPROC x NNODES=$NNODES; set one of them"
        GRAD_ACCUM=$((BATCH / together))
    fi
}

# Flags that pretraining and fine-tuning have in common.
common_flags() {
    set_grad_accum
    FLAGS=(
        --model_name_or_path "$LLM"
        --version "$VERSION"
        --vision_tower "$VISION_TOWER"
        --data_path "$DATA"
        --image_folder "$IMAGE_FOLDER"
        --mm_family "$MM_FAMILY"
        --mm_projector_type "${PROJECTOR:=mlp2x_gelu}"
        --mm_vision_select_layer -2
        --image_aspect_ratio "${ASPECT_RATIO:=pad}"
        --output_dir "$OUTPUT"
        --num_train_epochs "$EPOCHS"
        --per_device_train_batch_size "$PER_DEVICE_BATCH"
        --gradient_accumulation_steps "$GRAD_ACCUM"
        --learning_rate "$LR"
        --weight_decay 0.
        --warmup_steps 0.03
        --lr_scheduler_type cosine
        --model_max_length "$MAX_LENGTH"
        --gradient_checkpointing "${CHECKPOINTING:=True}"
        --save_strategy steps
        --save_steps "${SAVE_STEPS:=1000}"
        --save_total_limit 1
        --logging_steps 1
        --dataloader_num_workers "${WORKERS:=4}"
        --seed "$SEED"
        --report_to tensorboard
    )
    if [[ "$USE_CPU" == 1 ]]; then
        FLAGS+=(--use_cpu True)
    else
        FLAGS+=(--bf16 True --tf32 True)
    fi
    if [[ "$PER_DEVICE_BATCH" == auto ]]; then FLAGS+=(--global_batch_size "$BATCH"); fi
    if [[ -n "$DEEPSPEED" ]]; then FLAGS+=(--deepspeed "$DEEPSPEED"); fi
}

# Everything a start needs, checked at once; nothing is launched when something is missing.
check_before_start() {
    local missing=0
    "$PYTHON" llava_sv/train/preflight.py "$@" || missing=1
    if [[ "$USE_CPU" != 1 ]] && ! command -v nvidia-smi >/dev/null && ! command -v rocm-smi >/dev/null; then
        echo "error: no GPU found (neither nvidia-smi nor rocm-smi); to train on CPU: USE_CPU=1 NPROC=1 DEEPSPEED= bash $0" >&2
        missing=1
    fi
    ((missing == 0)) || exit 2
}

# The command that starts as many processes as NPROC, NNODES and HOSTFILE say.
launcher() {
    if [[ -n "$DEEPSPEED" && "$USE_CPU" != 1 ]]; then
        RUN=("$(dirname "$PYTHON")/deepspeed" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
        [[ -x "${RUN[0]}" ]] || RUN[0]=deepspeed
        if [[ -n "$HOSTFILE" ]]; then
            RUN+=(--hostfile "$HOSTFILE")
        elif ((NNODES > 1)); then
            fail "NNODES=$NNODES with DeepSpeed: name the nodes in HOSTFILE (a line a node: host slots=8)"
        else
            RUN+=(--num_gpus "$NPROC")
        fi
    elif ((NPROC * NNODES > 1)); then
        RUN=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC" --nnodes "$NNODES" --node_rank "$NODE_RANK"
            --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    else
        RUN=("$PYTHON")
    fi
}

launch() {
    FLAGS+=("$@")
    if [[ "${PLAN:=0}" == 1 && "$DRY_RUN" != 1 ]]; then exec "$PYTHON" -m llava_sv.train.memory_plan --world_size $((NPROC * NNODES)) "${FLAGS[@]}"; fi
    launcher
    if [[ "$DRY_RUN" == 1 ]]; then
        printf '%s\n' "${RUN[@]}" llava_sv/train/train_mem.py "${FLAGS[@]}"
        exit 0
    fi
    check_before_start "${FLAGS[@]}"
    exec "${RUN[@]}" llava_sv/train/train_mem.py "${FLAGS[@]}"
}
