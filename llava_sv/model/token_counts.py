"""How many tokens of each role an image takes, by family: known from the config and the image's size alone.

`model.multimodal_projector` must lay out as many; a test compares. N patches of one view, Nr retained, Ns skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.cos_presets import scales_of
from llava_sv.tiling import (
    NO_TILES,
    Grid,
    Size,
    choose_grid,
    choose_resolution,
    default_pinpoints,
    parse_grid,
    unpadded,
)

ANYRES = "anyres"
"""The `image_aspect_ratio` that cuts and orders an image as LLaVA-NeXT does."""


@dataclass(frozen=True)
class TokenCounts:
    """Visual tokens of one image by role; `retained` includes `fine` ones and LLaVA-NeXT's newlines."""

    retained: int
    skipped: int = 0
    summaries: int = 0
    fine: int = 0

    @property
    def total(self) -> int:
        """Tokens in the spliced sequence."""
        return self.retained + self.skipped + self.summaries


def grid_side(config: Any) -> int:
    """Patches a side of one view of the encoder."""
    return config.vision_config["image_size"] // config.vision_config["patch_size"]


def hd_grid(config: Any, size: Size | None) -> Grid:
    """Tiles (columns, rows) of an image of `size`; without a size, the most that the config allows."""
    tile = config.vision_config["image_size"]
    if config.image_aspect_ratio == ANYRES:
        pinpoints = config.image_grid_pinpoints or default_pinpoints(tile)
        best = max(pinpoints, key=lambda p: p[0] * p[1]) if size is None else choose_resolution(size, pinpoints)
        return best[0] // tile, best[1] // tile
    fixed = parse_grid(config.hd_fixed_grid, config.hd_max_tiles) if config.hd_fixed_grid else None
    if size is None:
        return fixed or (config.hd_max_tiles, 1)
    return choose_grid(size, tile, config.hd_max_tiles, fixed)


def local_cells(config: Any, size: Size | None) -> Size:
    """Columns and rows of an image's local features as a map: all of its tiles', less `anyres`' padding."""
    side, (columns, rows) = grid_side(config), hd_grid(config, size)
    if (columns, rows) == NO_TILES and config.image_aspect_ratio != ANYRES:
        return 0, 0
    cells = columns * side, rows * side
    if config.image_aspect_ratio == ANYRES and size is not None:
        left, top, right, bottom = unpadded(size, cells)
        return right - left, bottom - top
    return cells


def _split(pool: int, skip: Any) -> int:
    """Skipped tokens that a pool of tokens leaves: at most Ns after merging."""
    return min(skip.num_skipped, pool) if skip.merge else pool


def count_llava(config: Any, size: Size | None) -> TokenCounts:
    """N dense; else Nr + Ns, and the summaries."""
    patches, skip = config.num_patches, config.skip_vision
    if skip is None:
        return TokenCounts(patches + int(config.mm_vision_select_feature == "cls_patch"))
    return TokenCounts(skip.num_retained, skip.skipped_of(patches), skip.summaries())


def count_llava_hd(config: Any, size: Size | None) -> TokenCounts:
    """N (tiles + 1) dense (`anyres`: unpadded, a newline a row); else the overview's, and Ns of the tiles' tokens.

    An image without tiles keeps its whole overview and skips nothing; there is nothing for a latter summary to pool.
    """
    patches, skip = config.num_patches, config.skip_vision
    columns, rows = local_cells(config, size)
    if skip is None:
        newlines = rows if config.image_aspect_ratio == ANYRES else 0
        return TokenCounts(patches + columns * rows + newlines)
    if not columns * rows:
        return TokenCounts(patches, 0, int(skip.former_summary))
    skipped = _split(patches - skip.num_retained + columns * rows, skip)
    return TokenCounts(skip.num_retained, skipped, skip.summaries())


def count_cos(config: Any, size: Size | None) -> TokenCounts:
    """All scales' queries dense; else the first Nr, coarse to fine, and Ns of the others."""
    scales, skip = scales_of(config, grid_side(config)), config.skip_vision
    total = sum(scale.queries for scale in scales)
    if skip is None:
        return TokenCounts(total)
    skipped = _split(total - skip.num_retained, skip)
    return TokenCounts(skip.num_retained, skipped, skip.summaries(), fine_of(scales[0].queries, skip.num_retained))


def fine_of(coarsest: int, num_retained: int) -> int:
    """CoS: retained tokens that are not of the coarsest scale."""
    return max(0, num_retained - coarsest)


COUNTS: dict[str, Callable[[Any, Size | None], TokenCounts]] = {
    "llava": count_llava,
    "llava_hd": count_llava_hd,
    "cos": count_cos,
}
"""Family -> (config, image size or None for the largest) -> counts."""


def count_tokens(config: Any, size: Size | None = None) -> TokenCounts:
    """Counts of an image of `size` (width, height in pixels), by the config's family."""
    return COUNTS[config.mm_family](config, size)


def with_family_budget(config: Any, skip_vision: dict[str, Any]) -> dict[str, Any]:
    """A `skip_vision` block with the family's own Nr and Ns where it gives none.

    LLaVA-HD: the overview, and as many again of the tiles; CoS: all scales but the finest, and a quarter of that one.
    """
    budget: dict[str, Any] = {}
    if not isinstance(skip_vision, dict):
        return skip_vision  # the config says what is wrong with it
    if config.mm_family == "llava_hd":
        budget = {"num_retained": config.num_patches, "num_skipped": config.num_patches}
    elif config.mm_family == "cos":
        counts = [scale.queries for scale in scales_of(config, grid_side(config))]
        budget = {"num_retained": sum(counts[:-1]), "num_skipped": max(counts[-1] // 4, 1)}
    return {**budget, **skip_vision}


def selects(config: Any) -> bool:
    """Whether retained tokens are chosen among an encoder's patches, by `skip_vision.selection`."""
    skip = config.skip_vision
    if skip is None or config.mm_family == "cos":
        return False
    return config.mm_family != "llava_hd" or skip.num_retained < config.num_patches


def check_counts(config: Any) -> None:
    """`UserError` for a token budget or a grid that the family cannot give. `config.vision_config` must be set."""
    skip, family = config.skip_vision, config.mm_family
    if family == "llava_hd":
        _check_hd(config)
    if family == "cos":
        scales = scales_of(config, grid_side(config))
        total = sum(scale.queries for scale in scales)
        if skip is not None:
            _check_budget(skip, total, f"the {total} tokens of {config.mm_projector_type}")
    elif skip is not None and family == "llava":
        skip.skipped_of(config.num_patches)
    elif skip is not None and skip.num_retained > config.num_patches:
        raise UserError(
            f"skip_vision: num_retained {skip.num_retained} is more than the {config.num_patches} patches of the "
            "overview"
        )
    if skip is not None and skip.skip_kv == "fine+skipped":
        check_has_middle(config)


def check_has_middle(config: Any) -> None:
    """`UserError` unless the family has tokens of a middle scale, which the KV level `fine+skipped` is about."""
    if config.mm_family != "cos":
        raise UserError(
            f"skip_kv 'fine+skipped' drops a middle scale, and family {config.mm_family!r} has none; "
            "use 'skipped' or 'none' (only 'cos' has a middle scale)"
        )


def _check_budget(skip: Any, total: int, what: str) -> None:
    wanted = skip.num_retained + (skip.num_skipped if skip.merge else 1)
    if wanted > total:
        raise UserError(
            f"skip_vision: num_retained {skip.num_retained} + num_skipped {wanted - skip.num_retained} is more than "
            f"{what}; lower one of them"
        )


def _check_hd(config: Any) -> None:
    tile = config.vision_config["image_size"]
    if config.hd_max_tiles < 1:
        raise UserError(f"hd_max_tiles: expected 1 or more, got {config.hd_max_tiles}")
    if config.hd_fixed_grid:
        parse_grid(config.hd_fixed_grid, config.hd_max_tiles)
    for pinpoint in config.image_grid_pinpoints or ():
        if len(pinpoint) != 2 or any(not isinstance(p, int) or p < tile or p % tile for p in pinpoint):
            raise UserError(
                f"image_grid_pinpoints: {pinpoint} is no (width, height) in multiples of the encoder's {tile} pixels"
            )
