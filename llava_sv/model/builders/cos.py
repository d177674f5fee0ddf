"""The CoS family (Chain-of-Sight): a multi-scale visual resampler over two feature levels of the encoder; global and
middle scales are retained, the finest is merged and skipped (the paper's section 6.1).

By default a dense or skipping model reads pictures at twice the encoder's own size with the preset `cos_1296`, as in
supervised fine-tuning; pretraining asks for `cos_80` at the encoder's own size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llava_sv.model.builders.assemble import assemble
from llava_sv.model.cos_presets import scales_of
from llava_sv.model.multimodal_encoder.builder import read_vision_config

DEFAULT_PRESET = "cos_1296"
AT_OWN_SIZE = ("cos_80",)
"""Presets for the encoder's own picture size."""


def build_cos(
    llm: str, vision_tower: str | None, skip_vision: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """See `build_model`."""
    options = with_defaults(vision_tower, options)
    if skip_vision is not None:
        skip_vision = {**default_budget(vision_tower, options), **skip_vision}
    return assemble("cos", llm, vision_tower, skip_vision, **options)


def with_defaults(vision_tower: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with preset, picture size and feature levels filled in."""
    vision = read_vision_config(vision_tower)
    options = {"mm_projector_type": DEFAULT_PRESET, **options}
    if options.get("mm_vision_image_size") is None:
        own = options["mm_projector_type"] in AT_OWN_SIZE
        options["mm_vision_image_size"] = vision.image_size if own else 2 * vision.image_size
    if options.get("mm_vision_feature_levels") is None:
        options["mm_vision_feature_levels"] = default_levels(vision.num_hidden_layers)
    return options


def default_levels(num_layers: int) -> list[int]:
    """Blocks 15 and 22 of 24, and in that proportion elsewhere: the last but one, and one at five eighths."""
    last = max(num_layers - 2, 0)
    return sorted({min(5 * num_layers // 8, max(last - 1, 0)), last})


def default_budget(vision_tower: str | None, options: dict[str, Any]) -> dict[str, int]:
    """Nr and Ns where nobody says: all scales but the finest, and a quarter of the finest's tokens."""
    vision = read_vision_config(vision_tower, options["mm_vision_image_size"])
    named = {"cos_windows": None, "cos_queries": None, **options}
    scales = scales_of(SimpleNamespace(**named), vision.image_size // vision.patch_size)
    retained = sum(scale.queries for scale in scales[:-1])
    return {"num_retained": retained, "num_skipped": max(scales[-1].queries // 4, 1)}
