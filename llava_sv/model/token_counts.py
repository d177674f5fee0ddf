"""How many tokens of each role an image takes, by family: known from the config and the image's size alone.

`model.multimodal_projector` must lay out as many; a test compares. N patches of one view, Nr retained, Ns skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.cos_presets import scales_of
from llava_sv.model.retained_budget import AUTO, check_most, refuse_auto, within_patches
from llava_sv.model.token_groups import KV_LEVELS, TokenRole
from llava_sv.tiling import ANYRES, Grid, Size, grid_of, parse_grid, sizes_of_grids, unpadded


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


@dataclass(frozen=True)
class FamilyCounts:
    """What a family's tokens depend on. Every function takes a config whose encoder is described (`vision_config`)."""

    count: Callable[[Any, Size | None], TokenCounts]
    """(config, image size, or None for the one with most tokens when dense) -> counts."""
    check: Callable[[Any], None]
    """`UserError` for a token budget or a grid that the family cannot give."""
    budget: Callable[[Any], dict[str, int]]
    """The family's own Nr and Ns, where they are not `SkipVisionConfig`'s defaults."""
    selects: Callable[[Any], bool]
    """Whether retained tokens are chosen by `skip_vision.selection`, in a config that skips."""
    sizes: Callable[[Any], list[Size | None]] = lambda config: [None]
    """Image sizes that between them give every count there is."""
    has_middle: bool = False
    """Whether retained tokens of a middle scale (`TokenRole.FINE`) may leave the KV-cache."""


def grid_side(config: Any) -> int:
    """Patches a side of one view of the encoder."""
    return config.vision_config["image_size"] // config.vision_config["patch_size"]


# -- LLaVA ----------------------------------------------------------------------------------------------------------


def count_llava(config: Any, size: Size | None) -> TokenCounts:
    """N dense; else Nr + Ns, and the summaries."""
    patches, skip = config.num_patches, config.skip_vision
    if skip is None:
        return TokenCounts(patches + int(config.mm_vision_select_feature == "cls_patch"))
    return TokenCounts(skip.mean_retained, skip.skipped_of(patches), skip.summaries())


def check_llava(config: Any) -> None:
    """Nr + Ns within the patches."""
    if config.skip_vision is not None:
        config.skip_vision.check_budget(config.num_patches, "patches of an image")


# -- LLaVA-HD -------------------------------------------------------------------------------------------------------


def hd_sizes(config: Any) -> list[Size]:
    """A size for each grid that an image may be cut by."""
    return sizes_of_grids(config, config.vision_config["image_size"])


def hd_grid(config: Any, size: Size | None) -> Grid:
    """Tiles (columns, rows) of an image of `size`; without a size, of the one with most tokens when dense."""
    return grid_of(config, config.vision_config["image_size"], size or _largest(config))


def local_cells(config: Any, size: Size | None) -> Size:
    """Columns and rows of an image's local features as a map: all of its tiles', less `anyres`' padding."""
    side, (columns, rows) = grid_side(config), hd_grid(config, size)
    cells = columns * side, rows * side
    if config.image_aspect_ratio != ANYRES:
        return cells
    left, top, right, bottom = unpadded(size or _largest(config), cells)
    return right - left, bottom - top


def _largest(config: Any) -> Size:
    def dense(size: Size) -> int:
        columns, rows = local_cells(config, size)
        return columns * rows + _newlines(config, rows)

    return max(hd_sizes(config), key=dense)


def _newlines(config: Any, rows: int) -> int:
    return rows if config.image_aspect_ratio == ANYRES else 0


def count_llava_hd(config: Any, size: Size | None) -> TokenCounts:
    """N (tiles + 1) dense (`anyres`: unpadded, a newline a row); else the overview's, and Ns of the tiles' tokens.

    An image without tiles keeps its whole overview and skips nothing; there is nothing for a latter summary to pool.
    """
    patches, skip = config.num_patches, config.skip_vision
    columns, rows = local_cells(config, size)
    if skip is None:
        return TokenCounts(patches + columns * rows + _newlines(config, rows))
    if not columns * rows:
        return TokenCounts(patches, 0, int(skip.former_summary))
    return TokenCounts(skip.mean_retained, skip.skipped_of(patches + columns * rows), skip.summaries())


def check_llava_hd(config: Any) -> None:
    """A grid that can be cut, and Nr within the overview."""
    tile, skip = config.vision_config["image_size"], config.skip_vision
    if config.hd_max_tiles < 1:
        raise UserError(f"hd_max_tiles: expected 1 or more, got {config.hd_max_tiles}")
    if config.hd_fixed_grid:
        parse_grid(config.hd_fixed_grid, config.hd_max_tiles)
    for pinpoint in config.image_grid_pinpoints or ():
        if len(pinpoint) != 2 or any(not isinstance(p, int) or p < tile or p % tile for p in pinpoint):
            raise UserError(
                f"image_grid_pinpoints: {pinpoint} is no (width, height) in multiples of the encoder's {tile} pixels"
            )
    if skip is not None and skip.mean_retained > config.num_patches:
        raise UserError(
            f"skip_vision: {skip.retained_said} is more than the {config.num_patches} patches of the overview"
        )
    if skip is not None:
        check_most(skip, config.num_patches, "the overview's patches")


def budget_of_llava_hd(config: Any) -> dict[str, int]:
    """The overview, and as many again of the tiles."""
    return {"num_retained": config.num_patches, "num_skipped": config.num_patches}


# -- CoS ------------------------------------------------------------------------------------------------------------


def cos_queries_of(config: Any) -> list[int]:
    """Tokens of each scale, coarse to fine; `UserError` for scales that do not suit the encoder's grid."""
    return [scale.queries for scale in scales_of(config, grid_side(config))]


def count_cos(config: Any, size: Size | None) -> TokenCounts:
    """All scales' queries dense; else the first Nr, coarse to fine, and Ns of the others."""
    queries, skip = cos_queries_of(config), config.skip_vision
    if skip is None:
        return TokenCounts(sum(queries))
    fine = fine_of(queries[0], skip.mean_retained)
    return TokenCounts(skip.mean_retained, skip.skipped_of(sum(queries)), skip.summaries(), fine)


def fine_of(coarsest: int, num_retained: int) -> int:
    """Retained tokens that are not of the coarsest scale."""
    return max(0, num_retained - coarsest)


def check_cos(config: Any) -> None:
    """Scales that suit the grid, and Nr + Ns within their tokens."""
    queries = cos_queries_of(config)
    refuse_auto(config.skip_vision, config.mm_family)
    if config.skip_vision is not None:
        config.skip_vision.check_budget(sum(queries), f"tokens of {config.mm_projector_type}")


def budget_of_cos(config: Any) -> dict[str, int]:
    """All scales but the finest, and a quarter of that one."""
    *coarse, finest = cos_queries_of(config)
    return {"num_retained": sum(coarse), "num_skipped": max(finest // 4, 1)}


# -- by family ------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, FamilyCounts] = {
    "llava": FamilyCounts(count_llava, check_llava, budget=lambda config: {}, selects=lambda config: True),
    "llava_hd": FamilyCounts(
        count_llava_hd,
        check_llava_hd,
        budget_of_llava_hd,
        selects=lambda config: config.skip_vision.mean_retained < config.num_patches,
        sizes=hd_sizes,  # type: ignore[arg-type]
    ),
    "cos": FamilyCounts(count_cos, check_cos, budget_of_cos, selects=lambda config: False, has_middle=True),
}
"""Family -> how its tokens are counted."""


def count_tokens(config: Any, size: Size | None = None) -> TokenCounts:
    """Counts of an image of `size` (width, height in pixels), by the config's family; without a size, of the one that
    has most tokens when dense."""
    return FAMILIES[config.mm_family].count(config, size)


def most_tokens(config: Any) -> int:
    """The most tokens that an image of any size takes in the spliced sequence."""
    return max(count_tokens(config, size).total for size in FAMILIES[config.mm_family].sizes(config))


def with_family_budget(config: Any, skip_vision: dict[str, Any]) -> dict[str, Any]:
    """A `skip_vision` block with the family's own Nr and Ns where it gives none."""
    if not isinstance(skip_vision, dict):
        return skip_vision  # the config says what is wrong with it
    budget = FAMILIES[config.mm_family].budget(config)
    if skip_vision.get("num_retained") == AUTO:  # HD's own retains all there is to choose among
        budget = {"retained_mean": max(1, budget["num_retained"] // 2), **budget} if budget else {}
        most = config.num_patches - int(config.mm_family == "llava")  # which has nothing else to skip
        return within_patches({**budget, **skip_vision}, most)
    return {**budget, **skip_vision}


def selects(config: Any) -> bool:
    """Whether retained tokens are chosen among an encoder's patches, by `skip_vision.selection`."""
    return config.skip_vision is not None and FAMILIES[config.mm_family].selects(config)


def check_counts(config: Any) -> None:
    """`UserError` for a token budget or a grid that the family cannot give. `config.vision_config` must be set."""
    FAMILIES[config.mm_family].check(config)
    if config.skip_vision is not None:
        check_has_middle(config, config.skip_vision.skip_kv)


def check_has_middle(config: Any, level: str) -> None:
    """`UserError` for a KV level that drops a middle scale, where the family has none."""
    if TokenRole.FINE in KV_LEVELS[level] and not FAMILIES[config.mm_family].has_middle:
        known = ", ".join(repr(name) for name, family in FAMILIES.items() if family.has_middle)
        raise UserError(
            f"skip_kv {level!r} drops a middle scale, and family {config.mm_family!r} has none; "
            f"use 'skipped' or 'none' (only {known} has a middle scale)"
        )
