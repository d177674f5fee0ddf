"""Names of weights: transformers' LLaVA and LLaVA-NeXT on the disk, and this project's. Called by from_hf and to_hf.

Releases of transformers name the same weight differently; which names a checkpoint uses is its `Style`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

VISION = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."

LINEAR = {"linear_1": "0", "linear_2": "2"}


@dataclass(frozen=True)
class Style:
    """Prefixes on the disk: of the decoder, its head, the encoder, projector and newline (`parts`)."""

    decoder: str = "language_model.model."
    head: str = "language_model.lm_head."
    vision: str = "vision_tower.vision_model."
    parts: str = ""


def style_of(names: Iterable[str]) -> Style:
    """The style that a checkpoint's names are in; the published checkpoints' where nothing tells."""
    known = list(names)

    def first(prefixes: Iterable[str], default: str) -> str:
        return next((p for p in prefixes if any(name.startswith(p) for name in known)), default)

    plain = Style()
    return Style(
        first(("language_model.model.", "model.language_model."), plain.decoder),
        first(("language_model.lm_head.", "lm_head."), plain.head),
        first(
            (
                "vision_tower.vision_model.",
                "model.vision_tower.vision_model.",
                "vision_tower.",
                "model.vision_tower.",
            ),
            plain.vision,
        ),
        first(("model.multi_modal_projector.",), "")[: len("model.")],
    )


def to_ours(name: str, style: Style) -> str | None:
    """This project's name of `name`, or None for one that no part of a LLaVA has."""
    for prefix, ours in ((style.decoder, "model."), (style.head, "lm_head."), (style.vision, VISION)):
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    if name == f"{style.parts}image_newline":
        return f"{PROJECTOR}image_newline"
    prefix = f"{style.parts}multi_modal_projector."
    layer, dot, rest = name.removeprefix(prefix).partition(".")
    return f"{PROJECTOR}{LINEAR[layer]}{dot}{rest}" if name.startswith(prefix) and layer in LINEAR else None


def to_theirs(name: str, style: Style) -> str | None:
    """transformers' name of this project's `name`, or None for a weight that its models have not."""
    if name.startswith(VISION):
        return style.vision + name.removeprefix(VISION)
    if name == f"{PROJECTOR}image_newline":
        return f"{style.parts}image_newline"
    if name.startswith(PROJECTOR):
        layer, dot, rest = name.removeprefix(PROJECTOR).partition(".")
        theirs = {ours: theirs for theirs, ours in LINEAR.items()}.get(layer)
        return f"{style.parts}multi_modal_projector.{theirs}{dot}{rest}" if theirs else None
    if name.startswith("lm_head."):
        return style.head + name.removeprefix("lm_head.")
    return style.decoder + name.removeprefix("model.") if name.startswith("model.") else None
