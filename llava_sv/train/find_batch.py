"""`--per_device_train_batch_size auto`: the largest batch that fits each device, with the global batch kept.

Before anything is built, the memory plan says which powers of two fit (`settle`, on the command line: DeepSpeed
reads batch sizes as the arguments are made). On GPUs without DeepSpeed, real steps on the longest samples then say
whether the next larger ones fit or smaller ones are needed (`probe`); all ranks take the least. Accumulation follows
from `--global_batch_size`, so that what is optimised is the same for every batch found.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

from llava_sv.cluster.agree import gather
from llava_sv.errors import UserError
from llava_sv.train.preflight import read_flags, wants_cpu

PER_DEVICE, GLOBAL, ACCUMULATE = "per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps"
LIBRARYS_OWN = "auto_find_batch_size"
OLD_PER_DEVICE = "per_gpu_train_batch_size"
AUTO = "auto"
LARGEST = 256


def settle(argv: list[str]) -> list[str]:
    """The command line with numbers for `auto` and for the accumulation that `--global_batch_size` asks for.

    Raises `UserError` for a global batch that cannot be cut, and where not even one sample fits.
    """
    argv = [_renamed(word) for word in argv]
    given = read_flags(argv, (PER_DEVICE, GLOBAL, ACCUMULATE, LIBRARYS_OWN))
    if given.get(LIBRARYS_OWN, "false").lower() not in ("false", "no", "0"):
        raise UserError(
            f"--{LIBRARYS_OWN}: it would change the global batch, and each rank would find its own; use "
            f"--{PER_DEVICE} {AUTO} with --{GLOBAL}"
        )
    if GLOBAL not in given and given.get(PER_DEVICE) != AUTO:
        return argv
    if GLOBAL not in given:
        raise UserError(f"--{PER_DEVICE} {AUTO} needs --{GLOBAL} (scripts: BATCH), which it keeps by accumulation")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    whole = _number(given[GLOBAL])
    if given.get(PER_DEVICE, "8") != AUTO:
        return [*argv, f"--{ACCUMULATE}", str(accumulation(whole, _per_device(given), world))]
    if whole % world:
        raise UserError(f"--{GLOBAL} {whole}: no multiple of the {world} processes; choose one that is")
    from llava_sv.train.flags import without

    batch = _planned(argv, world)
    rest, _ = without(argv, (PER_DEVICE, ACCUMULATE))
    numbers = [f"--{PER_DEVICE}", str(batch), f"--{ACCUMULATE}", str(accumulation(whole, batch, world))]
    return [*rest, *numbers, "--probe_batch", "True"]


def _renamed(word: str) -> str:
    """A flag of older transformers by today's name; any other word as it is."""
    name, equals, value = word.partition("=")
    return f"--{PER_DEVICE}{equals}{value}" if name.replace("-", "_") == f"__{OLD_PER_DEVICE}" else word


def _per_device(given: dict[str, str]) -> int:
    try:
        return int(given.get(PER_DEVICE, "8"))
    except ValueError as error:
        raise UserError(f"--{PER_DEVICE}: expected a whole number or {AUTO}, got {given[PER_DEVICE]!r}") from error


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--{GLOBAL}: expected a whole number of 1 or more, got {text!r}")
    return int(text)


def accumulation(whole: int, batch: int, world: int) -> int:
    """Micro-batches of one optimizer step; `UserError` where the global batch is no multiple."""
    if batch < 1 or whole % (batch * world):
        raise UserError(
            f"--{GLOBAL} {whole} is no multiple of --{PER_DEVICE} {batch} x {world} processes; change one of them"
        )
    return whole // (batch * world)


def free_gib(use_cpu: bool) -> float:
    """GiB that this process may use: of its GPU, or its share of the machine's free memory."""
    import torch

    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory / 2**30
    import psutil

    return psutil.virtual_memory().available / 2**30 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _planned(argv: list[str], world: int) -> int:
    """The batch that the memory plan suggests, with checkpointing as the command has it."""
    from llava_sv.train.memory_plan import CHECKPOINTING, Planner, read

    memory = str(free_gib(wants_cpu(argv)))
    planner = Planner(read([*argv, "--world_size", str(world), "--gpu_memory", memory]))
    checkpointing = bool(getattr(planner.asked.values, CHECKPOINTING))
    found = planner.suggest(planner.layout(), checkpointing)
    if not found:
        raise UserError(planner.too_small(planner.layout(), checkpointing))
    return found


# -- real steps -------------------------------------------------------------------------------------------------------


def probes(args: Any) -> bool:
    """Whether real steps can say: on GPUs, and not under DeepSpeed, whose engine is made for one batch size."""
    return args.device.type == "cuda" and not args.deepspeed


def probe(model: Any, dataset: Any, collate: Callable[[list], dict], args: Any) -> None:
    """Replace the planned batch in `args` by the largest that a step on the longest samples fits, on every rank.

    Called on every rank, before the Trainer is made. Weights, gradients and random state stay as they were.
    """
    check_ranks(args)
    if not probes(args):
        return
    from llava_sv.train.adaptive import at_the_most

    whole = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    longest = dataset.longest(LARGEST, model.config.visual_tokens_per_image)
    samples: list[Any] = []

    def fits(batch: int) -> bool:
        while len(samples) < batch:
            samples.append(dataset[int(longest[len(samples) % len(longest)])])
        return agreed(step_fits(model, collate(samples[:batch]), args), args)

    share = whole // args.world_size
    allowed = [batch for batch in _powers() if share % batch == 0]
    with _unchanged(model), at_the_most(model):
        found = largest(fits, allowed, args.per_device_train_batch_size)
    if not found:
        raise UserError(
            f"--{PER_DEVICE} {AUTO}: a batch of 1 runs out of memory; add --gradient_checkpointing True, or use "
            "DeepSpeed (scripts/zero3.json), or shorten --model_max_length"
        )
    args.per_device_train_batch_size = found
    args.gradient_accumulation_steps = share // found


def _powers() -> list[int]:
    return [2**power for power in range(LARGEST.bit_length())]


def largest(fits: Callable[[int], bool], allowed: list[int], start: int) -> int:
    """The largest of `allowed` (rising) that fits, looked for from `start` on; 0 where none does.

    What fits is taken to fit for every smaller one.
    """
    at = allowed.index(start)
    if fits(allowed[at]):
        while at + 1 < len(allowed) and fits(allowed[at + 1]):
            at += 1
        return allowed[at]
    while at:
        at -= 1
        if fits(allowed[at]):
            return allowed[at]
    return 0


def step_fits(model: Any, batch: dict[str, Any], args: Any) -> bool:
    """Whether a forward and backward pass runs through with room left for what the optimizer will keep."""
    import torch

    held = None
    try:
        model.to(args.device).train()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        extra = 8 + (4 if args.world_size > 1 else 0)  # AdamW's two states, and DDP's buckets
        held = torch.empty(extra * trained, dtype=torch.uint8, device=args.device)
        run_step(model, batch, args)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del held
        model.zero_grad(set_to_none=True)
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def run_step(model: Any, batch: dict[str, Any], args: Any) -> None:
    """Forward and backward as training runs them, gradients of an earlier micro-batch beside."""
    import torch

    inputs = {
        name: value.to(args.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    inputs["images"] = [image.to(args.device) for image in batch["images"]]
    narrow = torch.bfloat16 if args.bf16 else torch.float16
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for _ in range(1 + (args.gradient_accumulation_steps > 1)):
        with torch.autocast(args.device.type, dtype=narrow, enabled=args.bf16 or args.fp16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Random state and mode of the model are put back."""
    import torch

    training, devices = model.training, list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    model.train(training)


def agreed(fits: bool, args: Any) -> bool:
    """Whether it fits on all ranks."""
    if args.world_size < 2:
        return fits
    import torch
    import torch.distributed as dist

    vote = torch.tensor(int(fits), device=args.device)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return bool(vote.item())


def check_ranks(args: Any) -> None:
    """`UserError` where the plan found another batch on another rank: their memories differ."""
    seen = gather(args.per_device_train_batch_size)
    if len(set(seen)) > 1:
        raise UserError(
            f"--{PER_DEVICE} {AUTO}: the ranks' devices hold different batches ({sorted(set(seen))}); give "
            f"--{PER_DEVICE} {min(seen)}"
        )
