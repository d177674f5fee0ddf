"""Which encoder a config asks for: by the exact `model_type` of its vision config, never by name."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from llava_sv.errors import UserError
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
    tower = tower_class(config.vision_config["model_type"], config.mm_vision_tower)
    attn = getattr(config, "_attn_implementation", None)
    return tower.from_config(config.vision_config, attn, *selected_of(config))


def check_selected_state(config: Any, vision_config: dict[str, Any]) -> None:
    """`UserError` for a hidden state or feature that the encoder of this `vision_config` does not have."""
    tower_class(vision_config["model_type"], config.mm_vision_tower).check_selected_state(
        vision_config, *selected_of(config)
    )


def check_selection(selection: str, vision_config: dict[str, Any]) -> None:
    """`UserError` for a selection that needs what the encoder of this `vision_config` does not give."""
    kind = vision_config["model_type"]
    provided = tower_class(kind, None).provides(vision_config)
    if selection in NEEDS and NEEDS[selection] not in provided:
        usable = [name for name in SELECTORS if NEEDS.get(name) in (None, *provided)]
        raise UserError(
            f"skip_vision.selection: {selection!r} needs a {NEEDS[selection]}, which this encoder ({kind}) lacks; "
            f"with it work: {', '.join(usable)}"
        )


def selected_of(config: Any) -> tuple[int, str, list[int] | None]:
    """Which hidden states and feature an encoder is asked for, as its `__init__` takes them."""
    return config.mm_vision_select_layer, config.mm_vision_select_feature, config.mm_vision_feature_levels


def read_vision_config(path: str | None, image_size: int | None = None) -> Any:
    """The vision config of the encoder's checkpoint at `path` (vision part or whole); `UserError` where there is none.

    `image_size` (`mm_vision_image_size`) replaces the encoder's own; it must be a multiple of the patch.
    """
    if not path:
        raise UserError("no vision tower is named: give --vision_tower, or mm_vision_tower in config.json")
    try:
        source = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"vision tower {path}: cannot read its config.json ({str(error).splitlines()[0]})") from error
    vision = getattr(source, "vision_config", source)
    tower_class(vision.model_type, path)
    if image_size is not None and image_size != vision.image_size:
        if image_size < vision.patch_size or image_size % vision.patch_size:
            raise UserError(
                f"mm_vision_image_size: {image_size} pixels are no multiple of the encoder's patch of "
                f"{vision.patch_size}; its own size is {vision.image_size}"
            )
        vision.image_size = image_size
    return vision


def tower_class(model_type: str, where: str | None) -> type[VisionTower]:
    """The encoder for a vision config's `model_type`; `UserError`, with `where` it is named, for an unknown one."""
    if model_type == NAFLEX:
        raise UserError(
            f"vision tower {where}: it is SigLIP 2's NaFlex form, which takes pictures of any shape; use a SigLIP 2 "
            "checkpoint of fixed size (google/siglip2-so400m-patch14-384, google/siglip2-base-patch16-224, ...)"
        )
    if model_type not in VISION_TOWERS:
        raise UserError(f"vision tower {where}: unknown encoder type {model_type!r}; known: {', '.join(VISION_TOWERS)}")
    return VISION_TOWERS[model_type]
