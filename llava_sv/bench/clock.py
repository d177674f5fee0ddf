"""Timing in interleaved rounds, counting FLOPs and bytes, and saying on what. Called by `bench train|infer`.

Each round runs every contender once, so that a slow moment falls on all; ratios are taken within a round.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from llava_sv.bench.storages import StorageCount
from llava_sv.errors import UserError
from llava_sv.generation import find_device

Step = Callable[[], dict[str, float]]
"""Runs once; returns what it measured of itself, in milliseconds."""


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one; `UserError` where it is not there or cannot be measured.

    A GPU that is named by its number becomes the current one.
    """
    device = find_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: times and memory are measured on cpu and cuda only; use one of them")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def keep_freed_memory(device: torch.device) -> bool:
    """CPU on glibc: keep what a step frees for the next one, as GPUs' allocators do and the tiny preset's scripts ask.

    Without it each step's large tensors are mapped and zeroed anew by the kernel, at a cost that no FLOP explains.
    Returns whether it took effect.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))


def now_ms(device: torch.device) -> float:
    """Wall-clock milliseconds, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000


def cpu_ms() -> float:
    """CPU milliseconds of this process so far, over all its threads: what a busy machine's waiting does not touch."""
    return time.process_time() * 1000


def rounds(steps: dict[str, Step], repeats: int, warmup: int, what: str) -> dict[str, list[dict[str, float]]]:
    """Run every step once a round, `warmup` unmeasured rounds first; what each measured, by round.

    The order turns, and every other round runs backwards: nobody comes first, or after the same one, more often.
    """
    names = list(steps)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tqdm(total=(warmup + repeats) * len(names), desc=what, unit="run", leave=False) as bar:
        for index in range(warmup + repeats):
            gc.collect()
            shift = index // 2 % len(names)
            order = names[shift:] + names[:shift]
            for name in reversed(order) if index % 2 else order:
                result = steps[name]()
                if index >= warmup:
                    measured[name].append(result)
                bar.update()
    return measured


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def median_ratio(over: list[dict[str, float]], under: list[dict[str, float]], key: str) -> float:
    """Median over rounds of one contender's figure divided by another's in the same round."""
    return statistics.median(a[key] / b[key] for a, b in zip(over, under))


def quartiles(over: list[dict[str, float]], under: list[dict[str, float]], key: str) -> list[float]:
    """Lower and upper quartile of that ratio (both its median for a single round)."""
    ratios = [a[key] / b[key] for a, b in zip(over, under)]
    if len(ratios) < 2:
        return ratios * 2
    cuts = statistics.quantiles(ratios, n=4, method="inclusive")
    return [cuts[0], cuts[2]]


def savings(
    skip: list[dict[str, float]], dense: list[dict[str, float]], key: str, flops_saved: float
) -> dict[str, float | list[float] | None]:
    """What `skip` saves over `dense`: of the time `key`, as median and quartiles over rounds; of FLOPs; and how much of
    the FLOP saving became time, None where there is none."""
    time_saved = 1 - median_ratio(skip, dense, key)
    return {
        "time_saved": time_saved,
        "time_saved_quartiles": sorted(1 - ratio for ratio in quartiles(skip, dense, key)),
        "flops_saved": flops_saved,
        "time_saved_per_flops_saved": time_saved / flops_saved if flops_saved else None,
    }


ATTENTION_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def _attention_flop(query_shape: Any, key_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, length, width = query_shape
    return 4 * batch * heads * length * key_shape[-2] * width


def _attention_backward_flop(grad_shape: Any, query_shape: Any, key_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _attention_flop(query_shape, key_shape) * 5 // 2


def flop_counter() -> FlopCounterMode:
    """torch's counter, one rule for every attention kernel (the CPU's too): the whole square, grouped heads as well."""
    rules: dict[Any, Any] = {}
    for kernel in ATTENTION_KERNELS:
        for suffix, rule in (("", _attention_flop), ("_backward", _attention_backward_flop)):
            op = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}", None)
            if op is not None:
                rules[op] = rule
    return FlopCounterMode(display=False, custom_mapping=rules)


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of one run, forward and backward, as executed."""
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


class SavedBytes:
    """Bytes that a forward keeps for its backward, each storage once, parameters left out."""

    def __init__(self, model: torch.nn.Module):
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._seen: dict[int, int] = {}
        self._alive: list[Tensor] = []

    @contextmanager
    def watch(self) -> Iterator[SavedBytes]:
        """Count what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept):
            yield self
        self._alive.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._seen[storage.data_ptr()] = storage.nbytes()
            # a freed storage's address may be given out again
            self._alive.append(tensor.detach())
        return tensor

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._seen.values())


def peak_bytes(run: Callable[[], Any], device: torch.device, *models: torch.nn.Module) -> int:
    """The most that tensors took during one run, the weights of `models` included.

    CUDA: its own counter, less what others than the models held before. CPU: bytes of live tensors, counted as
    operations run; what a kernel takes and gives back inside one does not show.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + bytes_of(*models)
    most = [0]
    with StorageCount() as counted:

        def watch() -> None:
            most[0] = max(most[0], counted.total)

        counted.on_change = watch
        held = [tensor.detach() for model in models for tensor in (*model.parameters(), *model.buffers())]
        run()
        held.clear()
    return most[0]


def bytes_of(*models: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, those that models share counted once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """On what it ran."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        **({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}),
        "cpu": cpu_name(),
        "memory_gib": round(memory_bytes(device) / 2**30, 1),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": "sdpa",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def memory_bytes(device: torch.device) -> int:
    """All memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_name() -> str:
    """The processor's name, as its maker has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "unknown"


def _processor() -> str:
    """A line such as `x86_64 CPU, 2 cores, AMX`."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.exists() else ""
    units = [name for flag, name in (("amx_bf16", "AMX"), ("avx512f", "AVX-512")) if flag in flags]
    name = platform.machine() or "unknown"
    cores = len(flags.split("\nprocessor")) if flags else torch.get_num_threads()
    return ", ".join([f"{name} CPU", f"{cores} cores", *units[:1]])
