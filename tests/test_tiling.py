"""Which grid an image needs, and its views: by hand, and LLaVA-NeXT's way against transformers' own functions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from llava_sv.errors import UserError
from llava_sv.mm_utils import process_images
from llava_sv.model.token_counts import count_tokens
from llava_sv.tiling import (
    NO_TILES,
    choose_grid,
    choose_resolution,
    cut,
    default_pinpoints,
    fit,
    grid_of,
    parse_grid,
    sizes_of_grids,
    unpadded,
)
from tests.data.samples import image_processor

SIZES = [(336, 336), (100, 50), (672, 672), (1000, 300), (300, 1000), (640, 480), (480, 640), (337, 336), (1920, 700)]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((336, 336), NO_TILES),
        ((20, 300), NO_TILES),
        ((337, 336), (2, 2)),
        ((672, 672), (2, 2)),
        ((3000, 3000), (2, 2)),
        ((1000, 500), (2, 1)),
        ((500, 1000), (1, 2)),
        ((1000, 330), (3, 1)),
        ((2000, 400), (4, 1)),
        ((400, 2000), (1, 4)),
        ((640, 480), (2, 2)),
        ((700, 480), (2, 1)),
        ((480, 700), (1, 2)),
    ],
)
def test_grids_by_hand(size, grid):
    """Up to 4 tiles: ratios 1/4, 1/3, 1/2, 1 (as 1x1 or 2x2; the larger wins), 2, 3, 4."""
    assert choose_grid(size, tile=336, max_tiles=4) == grid


def test_the_closest_ratio_of_all_grids():
    """Against every grid in turn, over many sizes; a picture on its side gets the grid on its side."""
    for most in (2, 4, 6, 9):
        for width in range(340, 2000, 97):
            for height in range(340, 2000, 89):
                grid = choose_grid((width, height), 336, most)
                assert grid[0] * grid[1] <= most
                assert choose_grid((height, width), 336, most) == grid[::-1] or grid[0] == grid[1]
                grid = (1, 1) if grid == NO_TILES else grid
                off = max(grid[0] / grid[1] / (width / height), width / height / (grid[0] / grid[1]))
                for c in range(1, most + 1):
                    for r in range(1, most // c + 1):
                        ratio = c / r / (width / height)
                        assert off <= max(ratio, 1 / ratio) + 1e-6


def test_a_fixed_grid_wins():
    assert choose_grid((10, 10), 336, 4, parse_grid("2x2", 4)) == (2, 2)
    assert parse_grid("3x1", 4) == (3, 1)
    assert choose_grid((900, 900), 336, 4, parse_grid("1x1", 4)) == NO_TILES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3x2", "3x2 has 6 tiles, but hd_max_tiles is 4; choose a smaller grid, or raise hd_max_tiles"),
        ("2", "cannot read '2'; write columns x rows, such as 2x2"),
        ("0x2", "cannot read '0x2'"),
    ],
)
def test_a_wrong_grid_is_one_line(text, message):
    with pytest.raises(UserError, match=message):
        parse_grid(text, 4)


def test_tiles_are_cut_row_by_row():
    canvas = Image.fromarray(np.arange(4 * 6, dtype=np.uint8).reshape(4, 6))
    tiles = [np.asarray(tile).tolist() for tile in cut(canvas, 2)]
    assert tiles[:4] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]], [[12, 13], [18, 19]]]
    assert len(tiles) == 6


def test_fit_keeps_the_whole_picture_in_the_middle():
    fitted = np.asarray(fit(Image.new("RGB", (40, 20), (255, 0, 0)), (64, 64), (1, 2, 3), Image.Resampling.BICUBIC))
    assert (fitted[16:48] == (255, 0, 0)).all()
    assert (fitted[:16] == (1, 2, 3)).all()
    assert (fitted[48:] == (1, 2, 3)).all()


@pytest.mark.parametrize("size", SIZES)
def test_anyres_resolution_is_llava_next_s(size):
    ours = choose_resolution(size, default_pinpoints(336))
    theirs = select_best_resolution(size[::-1], [[h, w] for w, h in default_pinpoints(336)])
    assert ours == (theirs[1], theirs[0])


@pytest.mark.parametrize("size", SIZES)
def test_unpadding_is_llava_next_s(size):
    cells = (48, 24)
    marked = torch.arange(cells[0] * cells[1]).reshape(1, cells[1], cells[0])
    left, top, right, bottom = unpadded(size, cells)
    assert torch.equal(marked[:, top:bottom, left:right], unpad_image(marked, size[::-1]))


def settings(**changes):
    vision = {"image_size": 32, "patch_size": 8}
    return SimpleNamespace(
        **{
            "mm_family": "llava_hd",
            "image_aspect_ratio": "pad",
            "hd_max_tiles": 4,
            "hd_fixed_grid": None,
            "image_grid_pinpoints": None,
            "vision_config": vision,
            "num_patches": 16,
            "skip_vision": None,
            **changes,
        }
    )


@pytest.mark.parametrize("aspect", ["pad", "square", "anyres"])
@pytest.mark.parametrize("size", [(20, 20), (32, 32), (70, 64), (100, 40), (40, 100), (200, 50)])
def test_views_are_as_many_as_the_config_counts(aspect, size):
    config = settings(image_aspect_ratio=aspect)
    (views,) = process_images([Image.new("RGB", size)], image_processor(32), config)
    assert views.shape[1:] == (3, 32, 32)
    columns, rows = grid_of(config, 32, size)
    assert len(views) == 1 + columns * rows
    if aspect != "anyres":
        assert count_tokens(config, size).total == 16 * len(views)
        return
    # one number a cell, padding cut off by transformers' own function; a newline ends each row
    real = unpad_image(torch.zeros(1, rows * 4, columns * 4), size[::-1])[0]
    assert count_tokens(config, size).total == 16 + real.numel() + len(real)


@pytest.mark.parametrize(
    "changes",
    [
        {"hd_max_tiles": 1},
        {},
        {"hd_max_tiles": 6},
        {"hd_fixed_grid": "1x3"},
        {"image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[32, 32], [96, 32]]},
    ],
)
def test_sizes_of_grids_reach_every_grid(changes):
    config = settings(**changes)
    reached = {grid_of(config, 32, size) for size in sizes_of_grids(config, 32)}
    every = {grid_of(config, 32, (width, height)) for width in range(8, 400, 9) for height in range(8, 400, 9)}
    assert reached == every


def test_square_tiles_are_the_stretched_picture_and_pad_tiles_the_fitted_one():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 90, 3), dtype=np.uint8))
    processor = image_processor(32)
    stretched = picture.resize((64, 32), Image.Resampling(processor.resample))
    (views,) = process_images([picture], processor, settings(image_aspect_ratio="square"))
    expected = [picture.resize((32, 32), Image.Resampling(processor.resample)), *cut(stretched, 32)]
    for view, image in zip(views, expected, strict=True):
        assert torch.equal(view, processor(images=image, return_tensors="pt")["pixel_values"][0])
    (views,) = process_images([picture], processor, settings())
    inner = 64, 29  # 40 * 64 / 90, rounded up
    canvas = Image.new("RGB", (64, 32), tuple(int(v * 255) for v in processor.image_mean))
    canvas.paste(picture.resize(inner, Image.Resampling(processor.resample)), (0, 1))
    for view, image in zip(views[1:], cut(canvas, 32), strict=True):
        assert torch.equal(view, processor(images=image, return_tensors="pt")["pixel_values"][0])


def test_an_image_of_one_tile_is_its_overview():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    (views,) = process_images([picture], image_processor(32), settings())
    plain = process_images([picture], image_processor(32), SimpleNamespace(image_aspect_ratio="pad"))
    assert torch.equal(views, plain)


def test_a_fixed_grid_cuts_every_picture_alike():
    config = settings(hd_fixed_grid="2x2")
    views = process_images([Image.new("RGB", (10, 10)), Image.new("RGB", (300, 50))], image_processor(32), config)
    assert [len(v) for v in views] == [5, 5]
