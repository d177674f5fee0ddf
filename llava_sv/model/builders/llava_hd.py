"""The LLaVA-HD family: an overview of the picture, whose tokens are retained, and tiles of it, whose tokens are merged
and skipped (the paper's section 6.1; tiling in `llava_sv.tiling`).

Budget by default: the whole overview is retained, and as many tokens again are skipped (576 and 576 at 336 pixels).
"""

from __future__ import annotations

from typing import Any

from llava_sv.model.builders.assemble import assemble
from llava_sv.model.config import patches_of
from llava_sv.model.multimodal_encoder.builder import read_vision_config


def build_llava_hd(
    llm: str, vision_tower: str | None, skip_vision: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """See `build_model`."""
    if skip_vision is not None:
        vision = read_vision_config(vision_tower, options.get("mm_vision_image_size"))
        skip_vision = {**default_budget(vision.to_dict()), **skip_vision}
    return assemble("llava_hd", llm, vision_tower, skip_vision, **options)


def default_budget(vision_config: dict[str, Any]) -> dict[str, int]:
    """Nr and Ns where nobody says: the overview's patches, twice."""
    patches = patches_of(vision_config)
    return {"num_retained": patches, "num_skipped": patches}
