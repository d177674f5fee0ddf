"""Scales of the CoS resampler: how each preset cuts the encoder's grid into windows, and how many queries each has.

`mm_projector_type` names a preset. Read by the config (token counts), the resampler and its compound scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llava_sv.errors import UserError


@dataclass(frozen=True)
class Scale:
    """One scale over a square grid: windows of `window` cells a side, and `queries` learned queries in all."""

    grid: int
    window: int
    queries: int

    @property
    def windows_per_side(self) -> int:
        return self.grid // self.window

    @property
    def queries_per_side(self) -> int:
        """Of one window, whose queries form a square."""
        return math.isqrt(self.queries) // self.windows_per_side


PRESETS: dict[str, tuple[tuple[int, int], ...]] = {
    "cos_80": ((1, 16), (4, 64)),
    "cos_80_448": ((1, 16), (4, 64)),
    "cos_336": ((1, 16), (4, 64), (8, 256)),
    "cos_1296": ((1, 16), (8, 256), (16, 1024)),
}
"""Coarse to fine: (windows a side, queries) of each scale. For CLIP ViT-L/14 these are the paper's window sizes: 16 and
4 cells of the 224-pixel grid (cos_80), 32 and 8 (cos_80_448), 32, 8 and 4 (cos_336), 32, 4 and 2 (cos_1296) of the
448-pixel grid."""

CUSTOM = "cos"
"""The projector type whose scales come from `cos_windows` and `cos_queries`."""


def is_resampler(projector_type: str) -> bool:
    """Whether `mm_projector_type` names a multi-scale resampler."""
    return projector_type == CUSTOM or projector_type in PRESETS


def query_counts(config: Any) -> list[int]:
    """Queries of each scale, coarse to fine: known without the encoder's grid."""
    if config.mm_projector_type == CUSTOM:
        return list(config.cos_queries or [])
    return [queries for _, queries in PRESETS[config.mm_projector_type]]


def scales_of(config: Any, grid: int) -> list[Scale]:
    """The resampler's scales, coarse to fine, over a grid of `grid` x `grid` features.

    Raises `UserError` for an unknown preset, a window that does not divide the grid, and queries that do not form
    equal squares in the windows.
    """
    name = config.mm_projector_type
    if name == CUSTOM:
        windows, queries = config.cos_windows, config.cos_queries
        if not windows or not queries or len(windows) != len(queries):
            raise UserError(
                "mm_projector_type 'cos' takes its scales from cos_windows and cos_queries, two lists of equal length, "
                f"such as [32, 4, 2] and [16, 256, 1024]; got {windows} and {queries}"
            )
        return [_checked(grid, window, count) for window, count in zip(windows, queries)]
    if name not in PRESETS:
        raise UserError(f"mm_projector_type: unknown resampler {name!r}; known: {', '.join((*PRESETS, CUSTOM))}")
    scales = []
    for per_side, queries in PRESETS[name]:
        if grid % per_side:
            raise UserError(
                f"mm_projector_type {name}: {per_side} windows a side do not divide the encoder's grid of {grid} x "
                f"{grid} patches; choose another preset or another mm_vision_image_size"
            )
        scales.append(_checked(grid, grid // per_side, queries))
    return scales


def _checked(grid: int, window: int, queries: int) -> Scale:
    if window < 1 or grid % window:
        raise UserError(
            f"cos_windows: a window of {window} cells does not divide the encoder's grid of {grid} x {grid} patches"
        )
    side = math.isqrt(queries)
    per_side = grid // window
    if side * side != queries or side == 0 or side % per_side:
        raise UserError(
            f"cos_queries: {queries} queries do not form equal squares in the {per_side} x {per_side} windows of "
            f"{window} cells; give (k x {per_side}) squared, such as {(2 * per_side) ** 2}"
        )
    return Scale(grid, window, queries)
