"""Which encoder a config asks for: by the exact `model_type` of its vision config, never by name."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from llava_sv.errors import UserError
from llava_sv.model.checkpoint_io import gathered, load_strictly, out_of_reach
from llava_sv.model.compression.select import NEEDS, SELECTORS
from llava_sv.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava_sv.model.multimodal_encoder.siglip_encoder import SiglipVisionTower
from llava_sv.model.multimodal_encoder.vision_tower import VisionTower

VISION_TOWERS: dict[str, type[VisionTower]] = {
    "clip_vision_model": CLIPVisionTower,
    "siglip_vision_model": SiglipVisionTower,
}
"""`model_type` of a vision config -> encoder. SigLIP 2's checkpoints of fixed size are `siglip_vision_model` too."""

NAFLEX = "siglip2_vision_model"


def build_vision_tower(config: Any) -> VisionTower:
    """An encoder as `config.vision_config` describes it, its weights to be loaded with the checkpoint."""
    tower = _tower_class(config.vision_config["model_type"], config.mm_vision_tower)
    attn = getattr(config, "_attn_implementation", None)
    return tower.from_config(config.vision_config, attn, *_selected(config))


def check_selected_state(config: Any, vision_config: dict[str, Any]) -> None:
    """`UserError` for a hidden state or feature that the encoder of this `vision_config` does not have."""
    _tower_class(vision_config["model_type"], config.mm_vision_tower).check_selected_state(
        vision_config, *_selected(config)
    )


def check_selection(selection: str, vision_config: dict[str, Any]) -> None:
    """`UserError` for a selection that needs what the encoder of this `vision_config` does not give."""
    kind = vision_config["model_type"]
    provided = _tower_class(kind, None).provides(vision_config)
    if selection in NEEDS and NEEDS[selection] not in provided:
        usable = [name for name in SELECTORS if NEEDS.get(name) in (None, *provided)]
        raise UserError(
            f"skip_vision.selection: {selection!r} needs a {NEEDS[selection]}, which this encoder ({kind}) lacks; "
            f"with it work: {', '.join(usable)}"
        )


def _selected(config: Any) -> tuple[int, str, list[int] | None]:
    return config.mm_vision_select_layer, config.mm_vision_select_feature, config.mm_vision_feature_levels


def read_vision_config(path: str | None, image_size: int | None = None) -> Any:
    """The vision config of the encoder's checkpoint at `path` (vision part or whole); `UserError` where there is none.

    `image_size` (`mm_vision_image_size`) replaces the encoder's own; it must be a multiple of the patch.
    """
    if not path:
        raise UserError("no vision tower is named: give --vision_tower, or mm_vision_tower in config.json")
    try:
        offline = not os.path.isdir(path) and out_of_reach()
        source = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=offline)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        if not os.path.isdir(path):
            why += (
                f"; fetch it where there is a network (hf download {path}), or say where it lies: --vision-tower FOLDER"
            )
        raise UserError(f"vision tower {path}: cannot read its config.json ({why})") from error
    vision = getattr(source, "vision_config", source)
    _tower_class(vision.model_type, path)
    if image_size is not None and image_size != vision.image_size:
        if image_size < vision.patch_size or image_size % vision.patch_size:
            raise UserError(
                f"mm_vision_image_size: {image_size} pixels are no multiple of the encoder's patch of "
                f"{vision.patch_size}; its own size is {vision.image_size}"
            )
        vision.image_size = image_size
    return vision


def load_vision_tower(path: str, config: Any, dtype: Any = None) -> VisionTower:
    """An encoder with its own pretrained weights, from the checkpoint (vision part or whole) at `path`.

    Its positions are interpolated where `config.mm_vision_image_size` is not the size it was trained at.
    """
    wanted = read_vision_config(path, config.mm_vision_image_size)
    kind = _tower_class(wanted.model_type, path)
    attn = getattr(config, "_attn_implementation", None)
    model = load_strictly(
        kind.model_class, path, unused_weights=kind.other_weights, dtype=dtype, attn_implementation=attn
    )
    if wanted.image_size != model.config.image_size:
        model = at_image_size(model, wanted.image_size)
    return kind(model, *_selected(config))


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


def _tower_class(model_type: str, where: str | None) -> type[VisionTower]:
    if model_type == NAFLEX:
        raise UserError(
            f"vision tower {where}: it is SigLIP 2's NaFlex form, which takes pictures of any shape; use a SigLIP 2 "
            "checkpoint of fixed size (google/siglip2-so400m-patch14-384, google/siglip2-base-patch16-224, ...)"
        )
    if model_type not in VISION_TOWERS:
        raise UserError(f"vision tower {where}: unknown encoder type {model_type!r}; known: {', '.join(VISION_TOWERS)}")
    return VISION_TOWERS[model_type]
