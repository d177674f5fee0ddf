"""The weights that a config.json asks for: the model is built without memory for values, and its names are read off.

A checkpoint's config and the shapes of its tensors come in, what is lacking or left over goes out. Called by converting
and `release` before anything is written, and by `verify`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sv.errors import UserError

if TYPE_CHECKING:  # torch is not needed to compare names
    from llava_sv.model.config import LlavaFields

Shapes = dict[str, tuple[int, ...]]

NOT_READ = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
"""Constants that older versions of transformers saved; the model computes them."""


@dataclass(frozen=True)
class Wanted:
    """Name -> shape of what a model loads, and which of the names may be absent because others bring their values."""

    shapes: Shapes
    tied: frozenset[str]


@dataclass(frozen=True)
class Mismatch:
    """How weights and their config disagree, in sorted names."""

    lacks: list[str]
    has: list[str]
    misshapen: list[str]


def wanted_by(config: LlavaFields) -> Wanted:
    """What the model of this config loads."""
    import torch

    from llava_sv.model.language_model.decoders import model_class

    with torch.device("meta"):
        model = model_class(config)(config)  # type: ignore[arg-type]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set()
    return Wanted(shapes, frozenset(tied))


def compare(wanted: Wanted, found: Shapes) -> Mismatch:
    """`found`: name -> shape of the weights that are there."""
    return Mismatch(
        lacks=sorted(wanted.shapes.keys() - found.keys() - wanted.tied),
        has=sorted(name for name in found.keys() - wanted.shapes.keys() if not NOT_READ.search(name)),
        misshapen=sorted(name for name in found if name in wanted.shapes and found[name] != wanted.shapes[name]),
    )


def refuse_mismatch(where: str | Path, wanted: Wanted, found: Shapes) -> None:
    """`UserError` that names weights which the checkpoint at `where` lacks, has too many, or has in another shape."""
    different = compare(wanted, found)
    for names, what in (
        (different.lacks, "lacks"),
        (different.has, "has, unlike its config,"),
        (different.misshapen, "has in another shape than its config says"),
    ):
        if names:
            other = names is different.misshapen
            shapes = f" ({list(found[names[0]])}, not {list(wanted.shapes[names[0]])})" if other else ""
            raise UserError(
                f"checkpoint {where}: {what} {len(names)} weight(s): {some(names)}{shapes}; does config.json belong to "
                "these weights?"
            )


def some(names: list[str], limit: int = 5) -> str:
    """`a, b and 7 more`."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
