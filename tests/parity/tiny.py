"""Random tiny models and batches for the parity tests. float64, so that tolerances can be tight."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig

from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.language_model.decoders import DECODERS, model_class

SKIP = {"num_retained": 4, "num_skipped": 5}
SIDE = 32
"""Pixels; 4 x 4 patches of 8."""


def tiny_config(skip: dict[str, Any] | None = SKIP, decoder: str = "llama", **overrides: Any) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
    )
    settings: dict[str, Any] = dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        pad_token_id=0,
        eos_token_id=None,
        max_position_embeddings=256,
        mm_vision_tower="random",
        vision_config=vision.to_dict(),
        mm_hidden_size=32,
        skip_vision=dict(skip) if skip is not None else None,
        attn_implementation="sdpa",
    )
    return DECODERS[decoder].config(**{**settings, **overrides})


def tiny_model(skip: dict[str, Any] | None = SKIP, seed: int = 0, decoder: str = "llama", **overrides: Any) -> Any:
    """Weights large enough that attention is far from uniform and a wrong mask shows."""
    torch.manual_seed(seed)
    config = tiny_config(skip, decoder, **overrides)
    model = model_class(config)(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "summary" in name:
                parameter.normal_(std=0.15)
    return model


def tiny_images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": (SKIP, {}),
    "llava_hd": ({"num_retained": 16, "num_skipped": 7}, {"hd_max_tiles": 4}),
    "cos": (
        {"num_retained": 20, "num_skipped": 6},
        {
            "mm_projector_type": "cos",
            "cos_windows": [4, 2, 1],
            "cos_queries": [4, 16, 16],
            "mm_vision_feature_levels": [0, 1],
        },
    ),
}
"""Family -> (a budget that fits it, its settings). HD: 16 patches a view; CoS: 4 + 16 + 16 tokens on 4 x 4 patches."""

VIEWS = (5, 1, 3, 2)
"""Overview and tiles of HD's images, in turn: 2 x 2 tiles, none, and fewer."""


def family_model(family: str, switches: dict[str, Any] | None = None, dense: bool = False, **overrides: Any):
    """`tiny_model` of a family; `switches` over its budget."""
    skip, settings = FAMILIES[family]
    block = None if dense else {**skip, **(switches or {})}
    return tiny_model(block, mm_family=family, **{**settings, **overrides})


def family_images(family: str, count: int) -> list[torch.Tensor]:
    """As many images as asked for, HD's in unequal numbers of views."""
    views = [VIEWS[i % len(VIEWS)] if family == "llava_hd" else 1 for i in range(count)]
    images = list(tiny_images(sum(views)).split(views))
    return images if family == "llava_hd" else [image[0] for image in images]


def ragged_batch(marks: tuple[tuple[int, int, int], ...] = ((3, 1, 5), (2, 2, 4), (6, 0, 3)), seed: int = 2):
    """Right-padded prompts (text before, images, text after): input_ids, attention_mask, labels, count of images."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for before, images, after in marks:
        text = torch.randint(1, 100, (before + after,), generator=generator).tolist()
        rows.append(text[:before] + [IMAGE_TOKEN_INDEX] * images + text[before:])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(~mask | (ids == IMAGE_TOKEN_INDEX), IGNORE_INDEX)
    labels[:, :2] = IGNORE_INDEX
    return ids, mask, labels, sum(images for _, images, _ in marks)


def features_of(grid: int, views: int = 2, levels: int = 2, seed: int = 1, width: int = 128) -> VisionFeatures:
    """Random features of a grid of `grid` x `grid`, at each of `levels`."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(views, grid**2, width, generator=generator, dtype=torch.float64) for _ in range(levels)]
    return VisionFeatures(maps[-1], levels=maps)
