"""Whether a benchmark fits into memory, said before it starts: a size in, an estimate or a refusal out.

Called by `bench train|infer|sweep`. Weights and activations are those of the dense model, the largest contender; what
a training step keeps is followed on shapes (`memory_trace`), all else is arithmetic. B batch, T dense sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_sv.bench.checkpoint import views_of
from llava_sv.bench.memory_trace import Work, trace
from llava_sv.bench.models import freeze_encoder, make_config
from llava_sv.bench.sizes import BenchSize
from llava_sv.constants import GIB
from llava_sv.errors import UserError
from llava_sv.model.language_model.decoders import model_class

MARGIN = 1.1
"""What allocators hold over what tensors take: assumed."""
CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
PEERS_LOGIT_BYTES = 12
"""transformers' loss keeps float32 logits, their logarithms and a gradient of each, of all positions."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. optimizer: those of AdamW's states, which a training benchmark can leave out."""

    parts: dict[str, int]
    optimizer: int = 0

    @property
    def total(self) -> int:
        """Bytes that must be free, the optimizer's left out."""
        return int(sum(self.parts.values()) * MARGIN)

    @property
    def with_optimizer(self) -> int:
        """Bytes that must be free to time the optimizer as well."""
        return int((sum(self.parts.values()) + self.optimizer) * MARGIN)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.parts.items() if size)
        return f"{_gib(self.total)} GiB ({parts}; a tenth more for what allocators hold)"


def _gib(size: float) -> str:
    return f"{size / GIB:,.0f}" if size >= 100 * GIB else f"{size / GIB:.3g}"


def available_bytes(device: torch.device) -> int:
    """Free memory: the GPU's, or the machine's within what its control group may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        found += [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    found += [left for folder in _control_groups() if (left := _free_in(folder)) is not None]
    return max(0, min(found)) if found else 2**62


def _control_groups() -> Iterator[Path]:
    """Folders of this process's control group and of those above it, of both versions: a container's limit is at the
    top, a batch system's somewhere in between."""
    lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines() if OWN_GROUPS.exists() else ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = CGROUP / "memory" if controllers else CGROUP
        own = top / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder == top or top in folder.parents)


LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a control group, version 2 and 1, and the line of `memory.stat` of what the kernel gives up when asked."""


def _free_in(folder: Path) -> int | None:
    """Bytes that a control group may still take; None where it has no limit."""
    for limit, used, given_up in LIMITS:
        try:
            most, now = ((folder / name).read_text(encoding="utf-8").strip() for name in (limit, used))
            stat = (folder / "memory.stat").read_text(encoding="utf-8") if (folder / "memory.stat").exists() else ""
        except OSError:
            continue
        if most.isdigit():
            pages = dict(line.split() for line in stat.splitlines() if len(line.split()) == 2)
            return int(most) - int(now) + int(pages.get(given_up, 0))
    return None


def weights_of(size: BenchSize, dtype: torch.dtype) -> int:
    """Bytes of the dense model's parameters."""
    with torch.device("meta"):
        model = model_class(make_config(size, None))._from_config(make_config(size, None), dtype=dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def scores_of(size: BenchSize, dtype: torch.dtype, device: torch.device | None, length: int, at_once: int) -> int:
    """Bytes of attention's scores, `at_once` layers' worth of them, where no fused kernel serves: in float32 with
    grouped heads on CUDA."""
    llm = size.llm
    fused = device is None or device.type != "cuda" or dtype != torch.float32
    if fused or llm.num_attention_heads == llm.num_key_value_heads:
        return 0
    return at_once * size.batch * llm.num_attention_heads * length**2 * dtype.itemsize


def of_train(size: BenchSize, dtype: torch.dtype, with_peers: bool, device: torch.device | None = None) -> Estimate:
    """A training step of the largest contender, and the second model's weights while both are made."""
    config = make_config(size, None)

    def prepare(model: Any) -> Any:
        return freeze_encoder(model, size.family)

    step = trace(config, Work(size.batch, size.text_tokens, weights=dtype), prepare, lambda name: "model")
    worst = step.worst()
    length = size.text_tokens + config.dense_tokens_per_image()
    # a layer's are kept for its backward pass; three more come and go
    scores = scores_of(size, dtype, device, length, at_once=size.llm.num_hidden_layers + 3)
    logits = size.batch * length * size.llm.vocab_size
    peer = logits * (dtype.itemsize + PEERS_LOGIT_BYTES) if with_peers else 0
    return _estimate(
        step.weight_bytes,
        {
            "gradients": worst.gradients,
            "activations": worst.activations,
            "attention's scores": scores,
            "the peer's logits": peer,
        },
        optimizer=2 * step.gradient_bytes,
    )


def of_infer(size: BenchSize, dtype: torch.dtype, new_tokens: int, device: torch.device | None = None) -> Estimate:
    """An answer: the dense cache, and what a layer of the prefill or the encoder holds at once."""
    llm, vision = size.llm, size.vision
    config = make_config(size, None, new_tokens)
    length = size.text_tokens + config.dense_tokens_per_image()
    kv = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * (length + new_tokens) * size.batch
    decoder = size.batch * length * (8 * llm.hidden_size + 3 * llm.intermediate_size + length)  # the mask is T x T
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    encoder = size.batch * views_of(config) * patches * (8 * vision["hidden_size"] + 2 * vision["intermediate_size"])
    return _estimate(
        weights_of(size, dtype),
        {
            "KV cache": kv * dtype.itemsize,
            "activations": max(decoder, encoder) * dtype.itemsize,
            "attention's scores": scores_of(size, dtype, device, length, at_once=3),
        },
    )


def _estimate(weights: int, working: dict[str, int], optimizer: int = 0) -> Estimate:
    """The second model is whole until it takes over the first one's weights: that moment may be the worst."""
    second = max(0, weights - sum(working.values()))
    return Estimate({"weights": weights, "a second copy while they are made": second, **working}, optimizer)


def check_room(estimate: Estimate, device: torch.device, name: str, what: str, with_peers: bool) -> None:
    """`UserError` where less is free than is needed."""
    free = available_bytes(device)
    if estimate.total > free:
        peers = ", or --no-peers" if with_peers else ""
        raise UserError(
            f"{name}: bench {what} needs about {estimate}, and {_gib(free)} GiB are free on {device.type}; "
            f"take fewer --layers{' or' if not with_peers else ','} a smaller --batch{peers}"
        )


def without_optimizer(estimate: Estimate, device: torch.device) -> str | None:
    """Why the optimizer is not timed, where its states do not fit beside the rest; None where they do."""
    free = available_bytes(device)
    if estimate.with_optimizer <= free:
        return None
    return (
        f"the optimizer is not timed: with AdamW's states about {_gib(estimate.with_optimizer)} GiB are needed, and "
        f"{_gib(free)} GiB are free on {device.type}"
    )
