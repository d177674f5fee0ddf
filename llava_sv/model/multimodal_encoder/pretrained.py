"""Encoders with their own pretrained weights, for another size of pictures if need be. Called where models load."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_sv.model.checkpoint_io import load_strictly
from llava_sv.model.gathering import gathered
from llava_sv.model.multimodal_encoder.builder import read_vision_config, selected_of, tower_class
from llava_sv.model.multimodal_encoder.vision_tower import VisionTower


def load_vision_tower(path: str, config: Any, dtype: Any = None) -> VisionTower:
    """An encoder with its own pretrained weights, from the checkpoint (vision part or whole) at `path`.

    Its positions are interpolated where `config.mm_vision_image_size` is not the size it was trained at.
    """
    wanted = read_vision_config(path, config.mm_vision_image_size)
    kind = tower_class(wanted.model_type, path)
    attn = getattr(config, "_attn_implementation", None)
    model = load_strictly(
        kind.model_class, path, unused_weights=kind.other_weights, dtype=dtype, attn_implementation=attn
    )
    if wanted.image_size != model.config.image_size:
        model = at_image_size(model, wanted.image_size)
    return kind(model, *selected_of(config))


POSITIONS = "embeddings.position_embedding.weight"


def at_image_size(model: Any, image_size: int) -> Any:
    """The encoder for square pictures of `image_size` pixels: positions interpolated bicubically, CLS's kept.

    model: a CLIP or SigLIP vision model. A new model; all other weights are the old ones.
    """
    config = copy.deepcopy(model.config)
    config.image_size = image_size
    with gathered(list(model.parameters())):  # ZeRO-3 loads it partitioned; the new one is whole until training starts
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    old_side, new_side = (c.image_size // c.patch_size for c in (model.config, config))
    weights[POSITIONS] = interpolate_positions(weights[POSITIONS], old_side, new_side)
    resized = type(model)(config).to(model.dtype)
    resized.load_state_dict(weights)
    return resized


def interpolate_positions(positions: Tensor, old_side: int, new_side: int) -> Tensor:
    """[extra + old_side^2, E] -> [extra + new_side^2, E]: bicubic over the grid; the extra first rows (CLS) stay."""
    extra = positions.shape[0] - old_side**2
    grid = positions[extra:].float().reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(new_side**2, -1).to(positions.dtype)
    return torch.cat([positions[:extra], grid])
