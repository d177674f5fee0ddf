"""The memory that real training steps take: a config and a `Work` in, bytes out. The yardstick of the plan.

On CUDA what was asked of the allocator; on CPU every allocation and release that torch's CPU allocator reports to the
profiler, added up. Called by `bench memory` and by tests.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llava_sv.bench.memory_trace import Prepare, Work, enable_checkpointing, forward, make_inputs
from llava_sv.bench.storages import StorageCount
from llava_sv.model.language_model.decoders import model_class

STEPS = 2
"""Optimizer steps: the first makes the optimizer's states, the second runs beside them."""


def train_steps(config: Any, work: Work, prepare: Prepare, device: torch.device) -> None:
    """Build the model with random weights and train it for `STEPS` steps with AdamW, gradients clipped."""
    config.tokenizer_model_max_length = None
    torch.manual_seed(0)
    with torch.device(device):
        model = prepare(model_class(config)._from_config(config, dtype=work.weights))
        inputs = make_inputs(config, work)
    model.train()
    if work.checkpointing:
        enable_checkpointing(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for _ in range(STEPS):
        for _ in range(1 + work.accumulating):
            forward(model, inputs, work).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that torch's allocator was asked for at once during `run`, which makes all it uses itself.

    CUDA: in a second run, since the first also makes what libraries keep for good, cuBLAS' workspaces above all.
    """
    gc.collect()
    if device.type == "cuda":
        run()
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
        gc.collect()
    return _highest(watched)


def peak_of_tensors(run: Callable[[Callable[[bool], None]], Any]) -> int:
    """The most bytes of tensors alive at once between the moments at which `run` calls what it is given, with True to
    begin and False to end.

    For several processes on CPU, where threads of the communication library let go of buffers of its own, which the
    profiler sees taken but never given back.
    """
    with StorageCount() as counted:
        most = [0]

        def watch() -> None:
            most[0] = max(most[0], counted.total)

        def watching(on: bool) -> None:
            gc.collect()
            counted.on_change = watch if on else None

        run(watching)
    return most[0]


def _highest(watched: Any) -> int:
    """The maximum of the running sum of all allocations and releases on the CPU."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
