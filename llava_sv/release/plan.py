"""What converting passes around: a checkpoint described in this project's own terms, its weights not read yet.

A layout's reader makes a `Plan` of a folder; a layout's writer makes a folder of a `Plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_sv.release.weights import Entry

LAYOUTS = ("sv", "hf", "llava")
"""This project's; transformers' own LLaVA and LLaVA-NeXT; LLaVA's (`liuhaotian/...`)."""


@dataclass
class Plan:
    """A checkpoint whose layout has been read."""

    source: Path
    layout: str
    """The source's, one of `LAYOUTS`."""
    config: dict[str, Any]
    """config.json in this project's fields (`model_type` llava_llama, ...; dense where `skip_vision` is absent)."""
    entries: list[Entry]
    """All weights under this project's names, in the source's order."""
    tokenizer: Any = None
    image_processor: Any = None
    notes: list[str] = field(default_factory=list)
    """What the user should be told: what was set, dropped or made new."""
