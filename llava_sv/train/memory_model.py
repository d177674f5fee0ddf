"""The model that a training command would build, from config.json files alone, and what of it trains.

Called by `memory_plan`. `asked` is its `Asked`.
"""

from __future__ import annotations

from typing import Any

import torch

from llava_sv.errors import UserError


def model_config(asked: Any, dense: bool = False) -> Any:
    """The config of the model that training would build; `UserError` where a config.json is not here."""
    from llava_sv.model.builders import get_builder
    from llava_sv.model.builders.assemble import make_config
    from llava_sv.model.builders.cos import with_defaults
    from llava_sv.model.loading import check_config, described_by, is_llava, read_config
    from llava_sv.model.multimodal_encoder.builder import read_vision_config
    from llava_sv.model.token_counts import with_family_budget
    from llava_sv.train.build import _set_anew, encoder_elsewhere
    from llava_sv.train.preflight import find_model
    from llava_sv.train.preflight import read_config as read_json

    args = asked.model_args
    family = args.mm_family or "llava"
    get_builder(family)
    own = find_model(str(args.model_name_or_path))
    if own is None:
        raise UserError(_no_config("model_name_or_path", args.model_name_or_path))
    if is_llava(read_json(own)):
        config = read_config(str(own), encoder_elsewhere(own, args.vision_tower))
        if config.vision_config is None:
            config.vision_config = _vision(config.mm_vision_tower, config.mm_vision_image_size, read_vision_config)
        _set_anew(config, args, {"image_aspect_ratio": asked.values.image_aspect_ratio})
        block = None if dense else args.skip_vision(config.skip_vision.to_dict() if config.skip_vision else None)
        described = described_by(config, config.vision_config)
        config.skip_vision = with_family_budget(described, block) if block else None
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


def prepare(asked: Any, model: Any, deepspeed: bool = False) -> Any:
    """What trains, as training chooses it; with LoRA, the adapters that the flags ask for.

    deepspeed: all weights are of one precision; elsewhere what trains beside frozen narrow weights is float32.
    """
    from llava_sv.bench.memory_cases import settle_precision
    from llava_sv.train import lora
    from llava_sv.train.build import choose_trainable

    choose_trainable(model, asked.model_args)
    if not asked.model_args.lora_enable:
        return model
    frozen = next(model.parameters()).dtype
    lora.put_in(model, asked.model_args)
    settle_precision(model, frozen, deepspeed)
    return model


CONSTANTS = {8: 0.0, 4: 1 / 16}
"""Bytes a weight of what quantisation notes beside it: at 4 bits a float32 for 64 weights; at 8 one a row."""

DOUBLE = 1 / 64
"""The same at 4 bits where those are quantised too: one byte for 64 weights."""


def saved_by_bits(args: Any, model: Any) -> int:
    """Bytes that `--bits` takes off the weights of a model before it has adapters.

    One layer's weight is there in full while its product is made: the largest counts as not quantised.
    """
    if args.bits == 16:
        return 0
    from llava_sv.model.adapters import LAYERS

    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name.startswith(LAYERS)]
    sizes = [module.weight.numel() for module in linear]
    constants = DOUBLE if args.bits == 4 and args.double_quant is not False else CONSTANTS[args.bits]
    before = linear[0].weight.element_size()
    return int(sum(sizes) * (before - args.bits / 8 - constants)) - max(sizes) * before
