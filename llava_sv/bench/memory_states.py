"""One process' memory in training: a `Trace` and how the model's states are spread in, bytes of each part out.

Weights, gradients, optimizer states and buffers follow from DeepSpeed's own layout (0.18 and 0.19), activations from
the trace. P parameters, Q those that train, w bytes of a weight, N processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llava_sv.bench.memory_trace import Trace

FP32 = 4
ADAM = 8
"""Bytes of AdamW's two float32 states of a parameter."""

ALLOCATOR = 1.08
"""What CUDA's caching allocator holds over what tensors take, with `expandable_segments`: assumed, not derived."""

CONTEXT = 1 * 2**30
"""CUDA context, cuBLAS and NCCL's own buffers: assumed, a card's full memory is never torch's."""


@dataclass(frozen=True)
class Layout:
    """How a run spreads its states. stage None: no DeepSpeed (several processes: DDP). Bucket sizes in elements."""

    stage: int | None = None
    world: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    overlap: bool = True
    reduce_bucket: int = 0
    prefetch_bucket: int = 0
    max_live: int = 10**9
    persist_below: int = 0
    sub_group: int = 10**9

    @property
    def name(self) -> str:
        """As a table shows it."""
        if self.stage is None:
            return "DDP" if self.world > 1 else "one process"
        offload = [name for name, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_param)) if on]
        return f"ZeRO-{self.stage}" + (f", {' and '.join(offload)} on the host" if offload else "")


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the worst moment, part by part, and on the host. phase: when that moment is."""

    layout: Layout
    parts: dict[str, int]
    phase: str
    host: int = 0
    activation_parts: dict[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> int:
        """All parts: what torch's allocator has given out."""
        return sum(self.parts.values())

    @property
    def device(self) -> int:
        """With the allocator's share and what the driver keeps: what the card must have."""
        return int(self.tensors * ALLOCATOR) + CONTEXT


def layout_of(deepspeed: dict[str, Any] | None, world: int, hidden: int) -> Layout:
    """Of a DeepSpeed configuration; `auto` sizes as transformers fills them in from the model's width."""
    if deepspeed is None:
        return Layout(world=world)
    zero = deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))

    def size(name: str, auto: float, default: float) -> int:
        value = zero.get(name, default)
        return int(float(auto if value == "auto" else value))

    def on_host(name: str) -> bool:
        return zero.get(name, {}).get("device", "none") in ("cpu", "nvme")

    return Layout(
        stage=stage,
        world=world,
        offload_optimizer=stage > 0 and on_host("offload_optimizer"),
        offload_param=stage == 3 and on_host("offload_param"),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        reduce_bucket=size("reduce_bucket_size", hidden**2, 5e8),
        prefetch_bucket=size("stage3_prefetch_bucket_size", int(0.9 * hidden**2), 5e7),
        max_live=size("stage3_max_live_parameters", 1e9, 1e9),
        persist_below=size("stage3_param_persistence_threshold", 10 * hidden, 1e5),
        sub_group=size("sub_group_size", 1e9, 1e9),
    )


def with_stage(layout: Layout, stage: int | None, offload: bool = False) -> Layout:
    """The same run at another stage; `offload`: optimizer and, at stage 3, weights on the host."""
    return replace(layout, stage=stage, offload_optimizer=offload, offload_param=offload and stage == 3)


def estimate(trace: Trace, layout: Layout, weight_bytes: int, accumulating: bool) -> Estimate:
    """The worst moment of a step. weight_bytes: w. accumulating: whether gradients of earlier micro-batches are there,
    which `trace` was made with as well."""
    states, host = _states(trace, layout, weight_bytes)
    kept, fixed = _gradients(trace, layout, weight_bytes, accumulating)
    moment = trace.worst(kept)
    passing = _while_passing(trace, layout, weight_bytes)
    busy = {**states, "gradients": fixed + kept(moment.gradients), **passing, "activations": moment.activations}
    stepping = {**states, **_while_stepping(trace, layout, weight_bytes, fixed)}
    if sum(stepping.values()) > sum(busy.values()):
        return Estimate(layout, _nonzero(stepping), "optimizer step", host)
    return Estimate(layout, _nonzero(busy), "forward and backward", host, moment.by_part)


def _nonzero(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


def _padded(elements: int, world: int) -> int:
    """Elements of one process' part."""
    return -(-elements // world)


def _states(trace: Trace, layout: Layout, w: int) -> tuple[dict[str, int], int]:
    """Weights and optimizer on the device, and what lies on the host instead."""
    parts = {"weights": trace.weight_bytes + trace.buffer_bytes, "optimizer": 0}
    if layout.stage is None or (layout.stage == 0 and w == FP32):
        return {**parts, "optimizer": ADAM * trace.trained}, 0
    own = _padded(trace.trained, layout.world)
    optimizer = (ADAM + FP32) * own  # ZeRO keeps a float32 copy of its part, of float32 weights too
    host = 0
    if layout.stage == 3:
        shards = w * sum(_padded(n, layout.world) for n, _ in trace.tensors)
        kept = w * sum(n for n, _ in trace.tensors if n < layout.persist_below)
        parts["weights"] = trace.buffer_bytes + kept + (0 if layout.offload_param else shards)
        host += shards if layout.offload_param else 0
    if layout.offload_optimizer:
        return {**parts, "optimizer": 0}, host + optimizer + FP32 * own
    return {**parts, "optimizer": optimizer}, host


def _gradients(trace: Trace, layout: Layout, w: int, accumulating: bool) -> tuple[Callable[[int], int], int]:
    """(bytes of gradients made so far -> bytes of them that stay on the device, bytes that are there all the time)."""
    own = w * _padded(trace.trained, layout.world)

    def all_of(made: int) -> int:
        return made

    def own_part(made: int) -> int:
        return own if made else 0  # taken whole as the first gradient arrives

    if layout.stage is None:
        return all_of, trace.gradient_bytes if layout.world > 1 else 0  # DDP's buckets
    if layout.stage == 0:
        return all_of, 0 if w == FP32 else FP32 * trace.trained
    if layout.stage == 1:
        return (all_of if accumulating else lambda made: made + own_part(made)), 0
    if layout.offload_optimizer:
        return (lambda made: 0), 0
    if layout.stage == 2:
        return (lambda made: 0, own) if accumulating else (own_part, 0)
    return (lambda made: 0), own


def _while_passing(trace: Trace, layout: Layout, w: int) -> dict[str, int]:
    """Weights gathered and gradients on their way to other processes, in the forward and backward pass."""
    if layout.stage is None or layout.stage == 0:
        return {}
    buffers = 1 + (layout.overlap and layout.stage < 3)
    buckets = buffers * layout.reduce_bucket * w
    if layout.stage < 3:
        return {"buckets": buckets}
    # weights that the backward pass reads again stay gathered, up to a limit; those it does not are let go
    again = trace.total - trace.run_once
    gathered = max(min(again, layout.max_live), max([n for n, _ in trace.tensors], default=0))
    return {"buckets": buckets, "gathered weights": w * gathered}


def _while_stepping(trace: Trace, layout: Layout, w: int, fixed: int) -> dict[str, int]:
    """Gradients, and what is made of them, as the optimizer steps."""
    if layout.stage is None or layout.stage == 0:
        return {"gradients": trace.gradient_bytes + fixed}
    if layout.offload_optimizer:
        return {}
    own = _padded(trace.trained, layout.world)
    group = own if layout.stage < 3 else _padded(min(trace.trained, layout.sub_group), layout.world)
    flat = w * group + (FP32 * group if w != FP32 else 0)
    return {"gradients": w * own, "flat gradients": flat}
