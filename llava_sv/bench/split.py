"""Where a training step's time goes: data, encoder, projector, splice, language model, backward, optimizer.

Measured in interleaved runs of its own, for the clock waits for the device at every border, and that would slow the
headline's runs down. Hooks on encoder, projector and decoder read it; they are taken off after each step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llava_sv.bench import clock

PARTS: dict[str, str] = {
    "data": "decode a JPEG a sample, make pixels, collate, copy to the device",
    "encoder": "vision encoder, forward",
    "projector": "projection, selection, merging, summaries, forward",
    "splice": "visual tokens into the text, and what stands between the other parts of the forward pass",
    "llm_forward": "decoder, output layer and loss",
    "backward": "backward pass of all that trains",
    "optimizer": "AdamW (fused) on all that trains, gradients dropped",
}
"""Parts of a step in their order; their times add up to the whole."""

METHOD = "clock read at each part's borders, the device's work done, in runs beside the headline's"
MOST_ROUNDS = 7
WARMUP = 1

Optimizer = torch.optim.Optimizer


def make_optimizer(model: torch.nn.Module, device: torch.device) -> Optimizer:
    """AdamW on what trains. It changes nothing (rate and decay are 0), so that all contenders keep the same weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))


@contextmanager
def watched(model: Any, device: torch.device) -> Iterator[dict[str, float]]:
    """Fills in when encoder, projector and decoder began (`encoder_from`) and ended (`encoder_to`), in milliseconds."""
    times: dict[str, float] = {}
    decoder = model.get_model()
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            times[name] = clock.now_ms(device)

        return hook

    for name, module in (("encoder", decoder.vision_tower), ("projector", decoder.mm_projector), ("llm", decoder)):
        handles.append(module.register_forward_pre_hook(note(f"{name}_from")))
        handles.append(module.register_forward_hook(note(f"{name}_to")))
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def split_step(
    model: Any, feed: Callable[[], dict[str, Any]], optimizer: Optimizer | None, device: torch.device
) -> clock.Step:
    """One whole step, split: `<part>_ms` of each of `PARTS`, 0 for an optimizer that is not there, and `whole_ms`."""

    def step() -> dict[str, float]:
        start = clock.now_ms(device)
        batch = feed()
        loaded = clock.now_ms(device)
        with watched(model, device) as at:
            loss = model(**batch, use_cache=False).loss
            computed = clock.now_ms(device)
        loss.backward()
        done = clock.now_ms(device)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        end = clock.now_ms(device) if optimizer is not None else done
        encoder, projector = at["encoder_to"] - at["encoder_from"], at["projector_to"] - at["projector_from"]
        llm = computed - at["llm_from"]
        return {
            "data_ms": loaded - start,
            "encoder_ms": encoder,
            "projector_ms": projector,
            "splice_ms": computed - loaded - encoder - projector - llm,
            "llm_forward_ms": llm,
            "backward_ms": done - computed,
            "optimizer_ms": end - done,
            "whole_ms": end - start,
        }

    return step


def measure(
    models: dict[str, Any],
    feed: Callable[[], dict[str, Any]],
    optimizer: Optimizer | None,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """The report's `split`: medians of each contender's parts, and what skipping saves of the whole step.

    models: name -> model, `dense` and `skip` among them, all trained by the one optimizer.
    """
    steps = {name: split_step(model, feed, optimizer, device) for name, model in models.items()}
    measured = clock.rounds(steps, min(repeats, MOST_ROUNDS), WARMUP, "train, split")
    medians = {name: clock.medians(results) for name, results in measured.items()}
    saved = {
        part: statistics.median(
            dense[f"{part}_ms"] - skip[f"{part}_ms"] for dense, skip in zip(measured["dense"], measured["skip"])
        )
        for part in PARTS
    }
    return {
        **medians,
        "saved_ms": saved,
        "time_saved": 1 - clock.median_ratio(measured["skip"], measured["dense"], "whole_ms"),
        "rounds": min(repeats, MOST_ROUNDS),
        "method": METHOD,
    }


def render(split: dict[str, Any]) -> list[str]:
    """Lines for a terminal, a contender each."""
    heads = {**{part: part.replace("_", " ") for part in PARTS}, "whole": "whole"}
    lines = [f"{'split, ms':<28}" + "".join(f"{head:>13}" for head in heads.values())]
    for name in ("dense", "skip"):
        lines.append(f"{'':<8}{name:<20}" + "".join(f"{split[name][f'{part}_ms']:>13.1f}" for part in heads))
    left_out = split.get("optimizer_left_out")
    lines.append(
        f"        time saved of the whole step {split['time_saved']:.1%}" + (f"; {left_out}" if left_out else "")
    )
    return lines
