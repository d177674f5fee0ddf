"""The model that a training command would build, from config.json files alone, and what of it trains.

Called by `memory_plan`. `asked` is its `Asked`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llava_sv.errors import UserError


def model_config(asked: Any, dense: bool = False) -> Any:
    """The config of the model that training would build; `UserError` where a config.json is not here."""
    from llava_sv.model.builders import get_builder
    from llava_sv.model.builders.assemble import make_config
    from llava_sv.model.builders.cos import with_defaults
    from llava_sv.model.loading import check_config, is_llava, read_config
    from llava_sv.model.multimodal_encoder.builder import read_vision_config
    from llava_sv.train.preflight import find_model
    from llava_sv.train.preflight import read_config as read_json

    args = asked.model_args
    family = args.mm_family or "llava"
    get_builder(family)
    own = find_model(str(args.model_name_or_path))
    if own is None:
        raise UserError(_no_config("model_name_or_path", args.model_name_or_path))
    if is_llava(read_json(own)):
        config = read_config(str(own))
        if config.vision_config is None:
            config.vision_config = _vision(config.mm_vision_tower, config.mm_vision_image_size, read_vision_config)
        block = args.skip_vision(config.skip_vision.to_dict() if config.skip_vision else None)
        config.skip_vision = None if dense else block
        check_config(config, config.vision_config)
        return config
    if not args.vision_tower or find_model(args.vision_tower) is None:
        raise UserError(_no_config("vision_tower", args.vision_tower))
    tower = str(find_model(args.vision_tower))
    settings = {**args.selected_state(), **args.family_settings()}
    if family == "cos":
        settings = with_defaults(tower, settings)
    settings["image_aspect_ratio"] = asked.values.image_aspect_ratio
    return make_config(family, str(own), tower, None if dense else args.skip_vision(), settings)


def _vision(name: str | None, size: int | None, reader: Any) -> dict[str, Any]:
    from llava_sv.train.preflight import find_model

    found = find_model(str(name))
    if found is None:
        raise UserError(_no_config("vision_tower", name))
    return reader(str(found), size).to_dict()


def _no_config(flag: str, name: str | None) -> str:
    if not name:
        return f"--{flag} is needed: a folder or Hugging Face id whose config.json is here"
    return (
        f"--{flag} {name}: no config.json here to plan from, neither in a folder nor in the Hugging Face cache; it is "
        f"enough to have that one file: hf download {name} config.json"
    )


def prepare(asked: Any, model: Any, stage: int | None) -> Any:
    """What trains, as training chooses it under a ZeRO stage (None: without DeepSpeed), adapters put in place."""
    from llava_sv.train import lora
    from llava_sv.train.build import choose_trainable

    choose_trainable(model, asked.model_args)
    lora.attach(model, asked.model_args, SimpleNamespace(**{**vars(asked.values), "deepspeed": stage is not None}))
    return model
