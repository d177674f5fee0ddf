"""A small checkpoint of each family, dense or skipping, saved as training saves it; weights that make a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_sv.model.builders import build_model
from tests.train.tiny import make_bases

BUDGETS: dict[str, dict[str, int]] = {
    "llava": {"num_retained": 4, "num_skipped": 5},
    "llava_hd": {"num_retained": 16, "num_skipped": 7},
    "cos": {"num_retained": 20, "num_skipped": 6},
}
"""16 patches a view; CoS: 16 + 64 tokens."""

SETTINGS: dict[str, dict[str, Any]] = {"llava": {}, "llava_hd": {}, "cos": {"mm_projector_type": "cos_80"}}


def save_family(
    folder: Path, family: str, skip: bool = True, settings: dict[str, Any] | None = None, **switches: Any
) -> Path:
    """`switches` over the family's budget; `settings` of the config."""
    llm, clip = make_bases(folder.parent / f"{folder.name}-bases")
    torch.manual_seed(0)
    block = {**BUDGETS[family], **switches} if skip else None
    options = {**SETTINGS[family], **(settings or {}), "conv_template": "llama_3"}
    tokenizer, model, processor = build_model(
        family, llm=str(llm), vision_tower=str(clip), skip_vision=block, **options
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "summary" in name:
                parameter.normal_(std=0.2)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder
