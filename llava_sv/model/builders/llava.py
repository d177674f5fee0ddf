"""The LLaVA family: CLIP's patches of one square view, an MLP projector, retained by likeness to CLS.

Its settings are `LlavaConfig`'s own defaults (the paper's section 6.1).
"""

from __future__ import annotations

from typing import Any

from llava_sv.model.builders.assemble import assemble


def build_llava(
    llm: str, vision_tower: str | None, skip_vision: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """See `build_model`."""
    return assemble("llava", llm, vision_tower, skip_vision, **options)
