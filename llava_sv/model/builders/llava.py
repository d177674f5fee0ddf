"""The LLaVA family: CLIP's patches of one square view, an MLP projector, retained by likeness to CLS."""

from __future__ import annotations

from typing import Any

from llava_sv.model.builders.assemble import assemble

DEFAULTS: dict[str, Any] = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
}


def build_llava(
    llm: str, vision_tower: str | None, skip_vision: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """See `build_model`: section 1's LLaVA column, unless overridden."""
    return assemble("llava", llm, vision_tower, skip_vision, DEFAULTS, **options)
