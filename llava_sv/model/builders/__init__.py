"""One recipe a family: base checkpoints in, (tokenizer, model, image processor) out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.builders.cos import build_cos
from llava_sv.model.builders.llava import build_llava
from llava_sv.model.builders.llava_hd import build_llava_hd

BUILDERS: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "llava": build_llava,
    "llava_hd": build_llava_hd,
    "cos": build_cos,
}


def get_builder(family: str) -> Callable[..., tuple[Any, Any, Any]]:
    """Look a family up by its exact name; `UserError` lists the known ones."""
    if family not in BUILDERS:
        raise UserError(f"mm_family: unknown family {family!r}; known: {', '.join(BUILDERS)}")
    return BUILDERS[family]


def build_model(family: str, llm: str, vision_tower: str, skip_vision: dict | None = None, **options: Any):
    """Build `family` from the checkpoints `llm` and `vision_tower`; dense where `skip_vision` is None.

    options: `pretrain_mm_mlp_adapter`, `torch_dtype`, `attn_implementation`, and any field of `LlavaConfig`.
    Returns (tokenizer, model, image_processor). Raises `UserError` for what does not fit together.
    """
    return get_builder(family)(llm=llm, vision_tower=vision_tower, skip_vision=skip_vision, **options)
