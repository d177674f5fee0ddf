"""How fast this machine multiplies matrices, measured beside what is timed: the yardstick of MFU.

`bench train` runs `matmul_step` as one more contender of its rounds, so that a slow moment falls on both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from llava_sv.bench import clock

MATMUL = "matmul"
"""The contender's name in the rounds."""

SMALLEST, LARGEST = 256, 8192
LONG_ENOUGH_MS = 10.0
"""Sides double until one product takes so long, or the largest is reached; products repeat until all do."""
MOST_PRODUCTS = 32


def matmul_step(device: torch.device, dtype: torch.dtype) -> tuple[clock.Step, dict[str, Any]]:
    """(a step that times products of two big squares, {side, products, flops of one step})."""
    side = SMALLEST
    while True:
        square = torch.randn(side, side, device=device, dtype=dtype)
        out = torch.empty_like(square)
        took = min(_time(square, out, 1, device) for _ in range(3))
        if took >= LONG_ENOUGH_MS or side == LARGEST:
            break
        side *= 2
    products = min(MOST_PRODUCTS, max(1, round(LONG_ENOUGH_MS / took)))

    def step() -> dict[str, float]:
        return {"ms": _time(square, out, products, device)}

    return step, {"side": side, "products": products, "flops": 2 * side**3 * products}


@torch.no_grad()
def _time(square: torch.Tensor, out: torch.Tensor, products: int, device: torch.device) -> float:
    start = clock.now_ms(device)
    for _ in range(products):
        torch.mm(square, square, out=out)
    return clock.now_ms(device) - start


def tflops(flops: float, milliseconds: float) -> float:
    """TFLOP/s."""
    return flops / milliseconds / 1e9


def describe(facts: dict[str, Any], measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What a report says of it: the rate is the median over rounds."""
    rate = statistics.median(tflops(facts["flops"], result["ms"]) for result in measured)
    return {"side": facts["side"], "products": facts["products"], "tflops": rate}


def mfu(
    flops: float,
    results: Sequence[dict[str, float]],
    matmul_flops: float,
    matmuls: Sequence[dict[str, float]],
    key: str = "step_ms",
) -> float:
    """Model FLOPs utilisation: FLOP/s of a contender over those of the same round's squares, median over rounds."""
    return statistics.median(
        tflops(flops, result[key]) / tflops(matmul_flops, matmul["ms"]) for result, matmul in zip(results, matmuls)
    )
