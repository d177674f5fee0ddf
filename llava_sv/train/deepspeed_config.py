"""A DeepSpeed configuration against the command line: what both say must agree, and what neither says is filled in.

Called by `distributed.prepare_deepspeed`. A contradiction is a `UserError` of one line that names both values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llava_sv.errors import UserError

FILLED_IN = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""What a configuration may leave out and then is the flags' ("auto"); DeepSpeed itself would not clip, for one."""

STAGES = (0, 1, 2, 3)

SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedulers, and the `--lr_scheduler_type` that asks for the same."""

ADAMS = ("adamw_torch", "adamw_torch_fused")
"""Values of --optim under which an "optimizer" section of the configuration is no contradiction: the default ones."""


def check_config(config: Any, own_rates: Sequence[str] = ()) -> None:
    """Refuse settings under which a run would quietly do something else than asked for.

    own_rates: the flags that were given and ask for another learning rate for a part of the model.
    """
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed: expected a JSON object, got a {type(config).__name__}; see scripts/zero2.json")
    for section in ("optimizer", "scheduler"):
        if section in config and own_rates:
            raise UserError(
                f'{own_rates[0]} with an "{section}" section in the DeepSpeed configuration: DeepSpeed would use one '
                f"learning rate for all; remove the section (the Trainer's {section} is used)"
            )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if isinstance(stage, bool) or stage not in STAGES:
        raise UserError(
            f'--deepspeed: "zero_optimization" has stage {stage!r}; known: {", ".join(map(str, STAGES))} '
            "(see scripts/zero1.json, zero2.json, zero3.json)"
        )
    if stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            'ZeRO-3 without "stage3_gather_16bit_weights_on_model_save": true would save no weights; '
            "set it (see scripts/zero3.json)"
        )


def check_against_flags(config: dict[str, Any], flags: Any, world: int) -> None:
    """`UserError` for the first value of `config` that is not "auto" and not what the command line says.

    flags: the training arguments. world: processes, over all nodes.
    """
    _check_total(config.get("train_batch_size"), flags, world)
    for key, said, flag, value in _pairs(config, flags):
        if said not in (None, "auto") and not _same(said, value):
            raise UserError(
                f'--deepspeed: "{key}" is {_shown(said)} in the configuration, but {flag} is {_shown(value)}; '
                f'make them the same, or write "auto" in the configuration and the flag counts'
            )
    _check_sections(config, flags)


def fill_in(config: dict[str, Any], flags: Any) -> dict[str, Any]:
    """`config` with "auto" (the flag counts) for what it leaves out."""
    config = {**dict.fromkeys(FILLED_IN, "auto"), **config}
    for precision in ("bf16", "fp16"):
        if getattr(flags, precision) and "enabled" not in config.get(precision, {}):
            config[precision] = {**config.get(precision, {}), "enabled": "auto"}
    return config


def _pairs(config: dict[str, Any], flags: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """(key, the configuration's value, flag, the flag's value) of everything that both can say."""
    for key, name in (
        ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("gradient_clipping", "max_grad_norm"),
    ):
        yield key, config.get(key), f"--{name}", getattr(flags, name)
    for precision in ("bf16", "fp16"):
        yield (
            f"{precision}.enabled",
            _under(config, precision).get("enabled"),
            f"--{precision}",
            getattr(flags, precision),
        )
    optimizer = _under(_under(config, "optimizer"), "params")
    for key, name in (("lr", "learning_rate"), ("eps", "adam_epsilon"), ("weight_decay", "weight_decay")):
        yield f"optimizer.params.{key}", optimizer.get(key), f"--{name}", getattr(flags, name)
    betas = [flags.adam_beta1, flags.adam_beta2]
    yield "optimizer.params.betas", optimizer.get("betas"), "--adam_beta1, --adam_beta2", betas
    schedule = _under(_under(config, "scheduler"), "params")
    yield "scheduler.params.warmup_max_lr", schedule.get("warmup_max_lr"), "--learning_rate", flags.learning_rate


def _check_total(said: Any, flags: Any, world: int) -> None:
    """The batch of one optimizer step over all processes."""
    each, accumulated = flags.per_device_train_batch_size, flags.gradient_accumulation_steps
    total = each * accumulated * world
    if said in (None, "auto") or _same(said, total):
        return
    number = said if isinstance(said, int) and not isinstance(said, bool) else None
    empty = number is not None and number // (world * accumulated) == 0
    why = (
        f": divided by {world} process(es) x {accumulated} accumulated it leaves a batch of 0 a device" if empty else ""
    )
    raise UserError(
        f'--deepspeed: "train_batch_size" is {_shown(said)} in the configuration{why}, but '
        f"--per_device_train_batch_size {each} x --gradient_accumulation_steps {accumulated} x {world} process(es) is "
        f'{total}; make them the same, or write "auto" in the configuration and the flags count'
    )


def _check_sections(config: dict[str, Any], flags: Any) -> None:
    """DeepSpeed's own optimizer and scheduler replace those that the flags name: both must mean the same."""
    kind = _under(config, "scheduler").get("type")
    chosen = str(getattr(flags.lr_scheduler_type, "value", flags.lr_scheduler_type))
    if kind is not None and SCHEDULES.get(kind) != chosen:
        same = f" (--lr_scheduler_type {SCHEDULES[kind]})" if kind in SCHEDULES else ""
        raise UserError(
            f'--deepspeed: "scheduler" is {kind}{same} in the configuration, but --lr_scheduler_type is {chosen}; '
            "make them the same, or remove the section"
        )
    optim = str(getattr(flags.optim, "value", flags.optim))
    kind = _under(config, "optimizer").get("type")
    if kind is not None and optim not in ADAMS:
        raise UserError(
            f'--deepspeed: "optimizer" is {kind} in the configuration, but --optim is {optim}; drop the flag, or '
            "remove the section"
        )


def _under(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _same(said: Any, value: Any) -> bool:
    if isinstance(said, str):  # DeepSpeed reads "1e-5" and YAML-like numbers too
        try:
            said = float(said)
        except ValueError:
            return False
    return bool(said == value)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
