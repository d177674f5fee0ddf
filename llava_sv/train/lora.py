"""LoRA and QLoRA in training: what can be asked for here, the frozen weights' precision, adapters put in place.

Called by `train.train` and `train.build`; the flags are `lora_flags`, adapters themselves `model.adapters`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from llava_sv.errors import UserError
from llava_sv.extras import how_to_get
from llava_sv.model import adapters
from llava_sv.model.quantization import four_bit, needs, quantized

STRUCTURE = ("r", "alpha", "bias", "target_modules", "bits")
"""Settings without which a checkpoint of adapters means another model."""


def check(model_args: Any, args: Any) -> None:
    """`UserError` for what this machine or this way of training cannot do, before anything is loaded."""
    base = str(model_args.model_name_or_path)
    if adapters.is_adapter(base):
        raise UserError(
            f"--model_name_or_path {base}: is a folder of adapters; go on from it with --lora_enable True "
            "--lora_weight_path on its base, or merge it first (llava-sv convert --merge-lora)"
        )
    if not model_args.lora_enable:
        return
    if args.fsdp:
        raise UserError(
            "--lora_enable with --fsdp is not supported: drop --fsdp; there is --deepspeed scripts/zero3.json"
        )
    if model_args.bits != 16:
        if zero_stage(args) == 3:
            raise UserError(
                f"--bits {model_args.bits} with ZeRO-3: quantised weights cannot be partitioned; "
                "use --deepspeed scripts/zero2.json, or --bits 16"
            )
        if args.use_cpu or not torch.cuda.is_available():
            raise UserError(
                f"--bits {model_args.bits}: needs a CUDA device and bitsandbytes "
                f"({how_to_get('train-gpu')}); use --bits 16 here"
            )
        needs(f"--bits {model_args.bits}")
    if model_args.lora_weight_path:
        _check_start(model_args)


def zero_stage(args: Any) -> int:
    """The stage of ZeRO that DeepSpeed runs with; 0 without DeepSpeed."""
    config = args.deepspeed if isinstance(args.deepspeed, dict) else {}
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _check_start(model_args: Any) -> None:
    """`--lora_weight_path` against the flags."""
    path = model_args.lora_weight_path
    if not adapters.is_adapter(path):
        raise UserError(f"--lora_weight_path {path}: no {adapters.CONFIG} there; give a folder of a LoRA run")
    found = adapters.read_config(path)
    for name, was in (("lora_r", found.r), ("lora_alpha", found.lora_alpha), ("lora_bias", found.bias)):
        now = model_args.lora_value(name)
        if was != now:
            raise UserError(f"--lora_weight_path {path}: was trained with --{name} {was}, now {now}: set it as it was")


def half(args: Any) -> torch.dtype | None:
    """The narrow type that training computes in, or None."""
    if args.fp16 and not args.deepspeed and args.device.type == "cpu":
        return None  # accelerate has no float16 autocast there: all is float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def frozen_dtype(model_args: Any, args: Any, otherwise: torch.dtype) -> torch.dtype:
    """The precision that weights are loaded in: with adapters, which leave them frozen, the one of computation.

    What trains becomes float32 again in `attach`, where DeepSpeed keeps no such copy itself.
    """
    return (half(args) or otherwise) if model_args.lora_enable else otherwise


def placement(model_args: Any, args: Any) -> dict[str, Any]:
    """Options of `from_pretrained` for the language model's weights: how they are quantised and where they go."""
    if not model_args.lora_enable or model_args.bits == 16:
        return {}
    if model_args.bits == 4:
        compute = half(args) or torch.float32
        config = four_bit(compute, model_args.quant_type or "nf4", model_args.double_quant is not False)
    else:
        config = quantized(load_8bit=True)
    return {"quantization_config": config, "device_map": {"": args.device}}


def attach(model: Any, model_args: Any, args: Any) -> None:
    """Adapters into the language model, after `build.choose_trainable`: its own weights freeze, encoder and projector
    train as they did. Without `--lora_enable`, nothing happens.

    Fresh adapters depend on `--seed` alone, whatever was drawn before.
    """
    if not model_args.lora_enable:
        return
    if model_args.bits != 16:
        beside = _trained_beside(model)
        _prepare_quantized(model, args)
        for parameter in beside:
            parameter.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        put_in(model, model_args)
    if not args.deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if model_args.lora_weight_path:
        adapters.load_state(model, model_args.lora_weight_path)


def put_in(model: Any, model_args: Any) -> None:
    """Fresh adapters where the flags say; they train, and of the rest what of encoder and projector did. `UserError`
    for layers that are not there. The memory plan calls this too, on a model without numbers."""
    targets = model_args.lora_targets() or adapters.linear_names(model)
    adapters.check_targets(model, targets)
    beside = _trained_beside(model)
    config = adapters.make_config(
        model_args.lora_value("lora_r"),
        model_args.lora_value("lora_alpha"),
        model_args.lora_value("lora_dropout"),
        model_args.lora_value("lora_bias"),
        targets,
        _remembered(str(model_args.model_name_or_path)),
    )
    adapters.inject(model, config)
    for parameter in beside:
        parameter.requires_grad_(True)


def _trained_beside(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.requires_grad and trains_beside(name)]


def trains_beside(name: str) -> bool:
    """Whether a parameter can train in full beside the adapters: the projector's and the encoder's."""
    return adapters.is_outside(name) and not name.startswith("lm_head")


def _remembered(base: str) -> str:
    """How adapters name their base: a folder by its absolute path, so that they find it from anywhere."""
    return str(Path(base).resolve()) if os.path.isdir(base) else base


def _prepare_quantized(model: Any, args: Any) -> None:
    """peft's preparation (norms in float32, nothing trains), with the large unquantised parts narrow again."""
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer sees to checkpointing
    narrow = half(args)
    if narrow is not None:
        for module in (model.get_input_embeddings(), model.get_output_embeddings(), model.get_vision_tower()):
            module.to(narrow)


def refuse_other(was: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """`UserError` where a checkpoint's adapters are not those that the flags ask for.

    was, asked: settings as `resume.settings_of` gives them.
    """
    if "lora" not in was or "lora" not in asked:
        return
    before, now = was["lora"], asked["lora"]
    mend = "set it as it was, or choose another --output_dir"
    if (before is None) != (now is None):
        said = "without" if before is None else "with"
        raise UserError(f"{folder} was trained {said} --lora_enable True: {mend}")
    for name in STRUCTURE if now is not None else ():
        if before.get(name) != now.get(name):
            flag = name if name == "bits" else f"lora_{name}"
            raise UserError(f"{folder} was trained with --{flag} {before.get(name)}, now {now.get(name)}: {mend}")


def numel(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter, whole under ZeRO-3, and unpacked where it is quantised to four bits."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
