"""Cutting a large picture into views of the encoder's size: which grid it needs, and the views themselves.

`mm_utils` makes pixels of the views, `model.token_counts` counts their tokens: both ask `grid_of`. Sizes are (width,
height) in pixels; a grid is (columns, rows); a tile is square, `tile` pixels a side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from llava_sv.errors import UserError

Size = tuple[int, int]
Grid = tuple[int, int]

NO_TILES: Grid = (0, 0)
"""An image that one tile holds: its overview shows it all."""

ANYRES = "anyres"
"""The `image_aspect_ratio` that cuts and orders an image as LLaVA-NeXT does."""


def grid_of(config: Any, tile: int, size: Size) -> Grid:
    """Tiles besides the overview of an image of `size`, as the config of a model that tiles says."""
    if config.image_aspect_ratio == ANYRES:
        width, height = choose_resolution(size, _pinpoints(config, tile))
        return width // tile, height // tile
    return choose_grid(size, tile, config.hd_max_tiles, _fixed_grid(config))


def sizes_of_grids(config: Any, tile: int) -> list[Size]:
    """Sizes of images that between them are cut by every grid that `grid_of` gives."""
    if config.image_aspect_ratio == ANYRES:
        return [(width, height) for width, height in _pinpoints(config, tile)]
    fixed = _fixed_grid(config)
    return [(columns * tile, rows * tile) for columns, rows in ([fixed] if fixed else _grids(config.hd_max_tiles))]


def _fixed_grid(config: Any) -> Grid | None:
    return parse_grid(config.hd_fixed_grid, config.hd_max_tiles) if config.hd_fixed_grid else None


def _pinpoints(config: Any, tile: int) -> Sequence[Sequence[int]]:
    return config.image_grid_pinpoints or default_pinpoints(tile)


def _grids(max_tiles: int) -> list[Grid]:
    return [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]


def choose_grid(size: Size, tile: int, max_tiles: int, fixed: Grid | None = None) -> Grid:
    """The grid of tiles that an image of `size` is cut into; `NO_TILES` where the overview is enough.

    `fixed` wins over everything. An image no larger than one tile needs none. Otherwise the grid of at most `max_tiles`
    tiles whose aspect ratio is closest (as a factor, so that a picture on its side gets the grid on its side); of
    equally close ones the largest.
    """
    width, height = size
    if fixed is None and max(width, height) <= tile:
        return NO_TILES

    def distance(grid: Grid) -> float:
        # rounded, so that 1x1 and 2x2 tie whatever the last bit says
        return round(abs(math.log(grid[0] * height / (grid[1] * width))), 9)

    grid = fixed or min(_grids(max_tiles), key=lambda grid: (distance(grid), -grid[0] * grid[1]))
    return NO_TILES if grid == (1, 1) else grid


def parse_grid(text: str, max_tiles: int) -> Grid:
    """`"2x2"` (columns x rows) -> (2, 2). `UserError` where it cannot be read or has more than `max_tiles` tiles."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"hd_fixed_grid: cannot read {text!r}; write columns x rows, such as 2x2")
    grid = int(match[1]), int(match[2])
    if grid[0] * grid[1] > max_tiles:
        raise UserError(
            f"hd_fixed_grid: {text} has {grid[0] * grid[1]} tiles, but hd_max_tiles is {max_tiles}; "
            "choose a smaller grid, or raise hd_max_tiles"
        )
    return grid


def cut(canvas: Image.Image, tile: int) -> list[Image.Image]:
    """The tiles of a canvas whose sides are multiples of `tile`, row by row."""
    columns, rows = canvas.width // tile, canvas.height // tile
    boxes = [(c * tile, r * tile, (c + 1) * tile, (r + 1) * tile) for r in range(rows) for c in range(columns)]
    return [canvas.crop(box) for box in boxes]


def fit(image: Image.Image, size: Size, color: tuple[int, int, int], resample: int) -> Image.Image:
    """The whole picture as large as `size` allows, in the middle of a canvas of that size."""
    width, height = image.size
    if size[0] * height < size[1] * width:
        inner = size[0], min(math.ceil(height * size[0] / width), size[1])
    else:
        inner = min(math.ceil(width * size[1] / height), size[0]), size[1]
    canvas = Image.new(image.mode, size, color)
    place = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas.paste(image.resize(inner, Image.Resampling(resample)), place)
    return canvas


# -- LLaVA-NeXT's `anyres` ---------------------------------------------------------------------------------------------


def default_pinpoints(tile: int) -> list[Size]:
    """LLaVA-NeXT's resolutions for an encoder of `tile` pixels: 1x2, 2x1, 2x2, 3x1 and 1x3 tiles."""
    return [(columns * tile, rows * tile) for columns, rows in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def choose_resolution(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """The resolution that keeps most of the picture's pixels, and of equally good ones wastes least (LLaVA-NeXT)."""
    width, height = size

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(resolution[0] * resolution[1] - kept)

    best = max(pinpoints, key=merit)
    return best[0], best[1]


def unpadded(size: Size, cells: Size) -> tuple[int, int, int, int]:
    """The part of a feature map of `cells` (columns, rows) that a picture of `size`, fitted into it, covers:
    (left, top, right, bottom), LLaVA-NeXT's rounding."""
    columns, rows = cells
    width, height = size
    if width * rows > columns * height:
        margin = (rows - int(round(height * columns / width, 7))) // 2
        return 0, margin, columns, rows - margin
    margin = (columns - int(round(width * rows / height, 7))) // 2
    return margin, 0, columns - margin, rows
