"""Which encoder a config asks for: by the exact `model_type` of its vision config, never by name."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, CLIPVisionModel

from llava_sv.errors import UserError
from llava_sv.model.checkpoint_io import load_strictly
from llava_sv.model.multimodal_encoder.clip_encoder import CLIPVisionTower

VISION_TOWERS: dict[str, type[CLIPVisionTower]] = {"clip_vision_model": CLIPVisionTower}


def build_vision_tower(config: Any) -> CLIPVisionTower:
    """An encoder as `config.vision_config` describes it, its weights to be loaded with the checkpoint."""
    tower = _tower_class(config.vision_config["model_type"], config.mm_vision_tower)
    attn = getattr(config, "_attn_implementation", None)
    return tower.from_config(config.vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature, attn)


def read_vision_config(path: str | None) -> Any:
    """The vision config of the CLIP checkpoint at `path` (vision part or whole); `UserError` where there is none."""
    if not path:
        raise UserError("no vision tower is named: give --vision_tower, or mm_vision_tower in config.json")
    try:
        source = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"vision tower {path}: cannot read its config.json ({str(error).splitlines()[0]})") from error
    vision = getattr(source, "vision_config", source)
    _tower_class(vision.model_type, path)
    return vision


def load_vision_tower(path: str, config: Any, dtype: Any = None) -> CLIPVisionTower:
    """An encoder with its own pretrained weights, from the CLIP checkpoint (vision part or whole) at `path`."""
    read_vision_config(path)
    attn = getattr(config, "_attn_implementation", None)
    other_half = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    model = load_strictly(CLIPVisionModel, path, unused_weights=other_half, dtype=dtype, attn_implementation=attn)
    return CLIPVisionTower(model, config.mm_vision_select_layer, config.mm_vision_select_feature)


def _tower_class(model_type: str, where: str | None) -> type[CLIPVisionTower]:
    if model_type not in VISION_TOWERS:
        raise UserError(f"vision tower {where}: unknown encoder type {model_type!r}; known: {', '.join(VISION_TOWERS)}")
    return VISION_TOWERS[model_type]
