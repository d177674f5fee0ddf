"""The CoS family (Chain-of-Sight): a multi-scale visual resampler over two feature levels of the encoder; global and
middle scales are retained, the finest is merged to a quarter and skipped (the paper's section 6.1).

By default pictures are read at twice the encoder's own size with the preset `cos_1296` (for a small encoder the largest
that suits its grid), as in supervised fine-tuning; pretraining asks for `cos_80`, at the encoder's own size.
"""

from __future__ import annotations

from typing import Any

from llava_sv.model.builders.assemble import assemble
from llava_sv.model.cos_presets import PRESETS
from llava_sv.model.multimodal_encoder.builder import read_vision_config

BY_SIZE = ("cos_1296", "cos_336", "cos_80_448")
"""Presets to choose from, most tokens first."""

AT_OWN_SIZE = ("cos_80",)
"""Presets for the encoder's own picture size."""


def build_cos(
    llm: str, vision_tower: str | None, skip_vision: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """See `build_model`."""
    return assemble("cos", llm, vision_tower, skip_vision, **with_defaults(vision_tower, options))


def with_defaults(vision_tower: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with preset, picture size and feature levels filled in."""
    vision = read_vision_config(vision_tower)
    options = dict(options)
    if options.get("mm_vision_image_size") is None:
        own = options.get("mm_projector_type") in AT_OWN_SIZE
        options["mm_vision_image_size"] = vision.image_size if own else 2 * vision.image_size
    if options.get("mm_projector_type") is None:
        options["mm_projector_type"] = default_preset(options["mm_vision_image_size"] // vision.patch_size)
    if options.get("mm_vision_feature_levels") is None:
        options["mm_vision_feature_levels"] = default_levels(vision.num_hidden_layers)
    return options


def default_preset(grid: int) -> str:
    """The preset with most tokens whose finest windows have two cells a side on this grid, or else one."""
    for cells in (2, 1):
        for name in BY_SIZE:
            finest = PRESETS[name][-1][0]
            if grid % finest == 0 and grid // finest >= cells:
                return name
    return BY_SIZE[0]  # fits nothing: whoever builds it says why


def default_levels(num_layers: int) -> list[int]:
    """Blocks 15 and 22 of 24, and in that proportion elsewhere: the last but one, and one at five eighths."""
    last = max(num_layers - 2, 0)
    return sorted({min(5 * num_layers // 8, max(last - 1, 0)), last})
