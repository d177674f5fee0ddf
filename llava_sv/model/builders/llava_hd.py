"""The LLaVA-HD family: an overview of the picture, whose tokens are retained, and tiles of it, whose tokens are merged
and skipped (the paper's section 6.1; tiling in `llava_sv.tiling`).

Budget by default: the whole overview is retained, and as many tokens again are skipped (576 and 576 at 336 pixels).
"""

from __future__ import annotations

from typing import Any

from llava_sv.model.builders.assemble import assemble


def build_llava_hd(
    llm: str, vision_tower: str | None, skip_vision: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any, Any]:
    """See `build_model`."""
    return assemble("llava_hd", llm, vision_tower, skip_vision, **options)
