"""Which encoder a config asks for: by the exact `model_type` of its vision config, never by name."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, CLIPVisionModel

from llava_sv.errors import UserError
from llava_sv.model.multimodal_encoder.clip_encoder import CLIPVisionTower

VISION_TOWERS: dict[str, type[CLIPVisionTower]] = {"clip_vision_model": CLIPVisionTower}


def build_vision_tower(config: Any) -> CLIPVisionTower:
    """An encoder as `config.vision_config` describes it, its weights to be loaded with the checkpoint."""
    tower = _tower_class(config.vision_config["model_type"], config.mm_vision_tower)
    attn = getattr(config, "_attn_implementation", None)
    return tower.from_config(config.vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature, attn)


def load_vision_tower(path: str, config: Any, dtype: Any = None) -> CLIPVisionTower:
    """An encoder with its own pretrained weights, from a CLIP checkpoint (vision part or whole) at `path`."""
    try:
        source = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"vision tower {path}: cannot read its config.json ({str(error).splitlines()[0]})") from error
    vision = getattr(source, "vision_config", source)
    _tower_class(vision.model_type, path)
    attn = getattr(config, "_attn_implementation", None)
    model, info = CLIPVisionModel.from_pretrained(
        path, dtype=dtype, attn_implementation=attn, output_loading_info=True
    )
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    if missing:
        raise UserError(f"vision tower {path}: weights are missing: {', '.join(sorted(missing)[:5])}")
    return CLIPVisionTower(model, config.mm_vision_select_layer, config.mm_vision_select_feature)


def _tower_class(model_type: str, where: str | None) -> type[CLIPVisionTower]:
    if model_type not in VISION_TOWERS:
        raise UserError(f"vision tower {where}: unknown encoder type {model_type!r}; known: {', '.join(VISION_TOWERS)}")
    return VISION_TOWERS[model_type]
