"""Putting a model together: language model, encoder and perhaps a pretrained projector. Shared by all families."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig

from llava_sv.errors import UserError
from llava_sv.mm_utils import load_image_processor
from llava_sv.model.attention import check_attn_implementation
from llava_sv.model.builders.tokenizer import load_tokenizer
from llava_sv.model.checkpoint_io import gathered, load_projector, load_strictly
from llava_sv.model.config import LlavaFields
from llava_sv.model.language_model.causal_lm import LlavaCausalLM
from llava_sv.model.language_model.decoders import DECODERS, model_class
from llava_sv.model.loading import check_config, strict_config
from llava_sv.model.multimodal_encoder.builder import load_vision_tower, read_vision_config
from llava_sv.model.token_counts import with_family_budget

logger = logging.getLogger(__name__)


def assemble(
    family: str,
    llm: str,
    vision_tower: str | None,
    skip_vision: dict[str, Any] | None,
    pretrain_mm_mlp_adapter: str | None = None,
    torch_dtype: Any = None,
    attn_implementation: str | None = None,
    placement: dict[str, Any] | None = None,
    **overrides: Any,
) -> tuple[Any, LlavaCausalLM, Any]:
    """(tokenizer, model, image_processor) of `family`; see `build_model`.

    placement: options of `from_pretrained` that say where the language model goes and how it is quantised.
    """
    check_attn_implementation(attn_implementation)
    config = make_config(family, llm, vision_tower, skip_vision, overrides)
    model = _load_on_language_model(llm, config, torch_dtype, attn_implementation, placement or {})
    if pretrain_mm_mlp_adapter is not None:
        load_projector(model, pretrain_mm_mlp_adapter)
    else:
        logger.info("no pretrained projector is given: it starts from fresh weights")
    tokenizer = load_tokenizer(llm)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model, load_image_processor(str(config.mm_vision_tower), config.mm_vision_image_size)


def make_config(
    family: str, llm: str, vision_tower: str | None, skip_vision: dict[str, Any] | None, settings: dict[str, Any]
) -> LlavaFields:
    """The config of a model from base checkpoints, checked as a whole before any weight is read.

    Raises `UserError` for a language model that is not one of `DECODERS`, an unknown name, or Nr + Ns over the patches.
    """
    base = _read_llm_config(llm)
    config_class = DECODERS[base.model_type].config
    _refuse_unknown(settings, config_class)
    dropped = ("model_type", "architectures", "transformers_version")
    values = {key: value for key, value in base.to_dict().items() if key not in dropped}
    vision = read_vision_config(vision_tower, settings.get("mm_vision_image_size"))
    values.update(mm_family=family, mm_vision_tower=vision_tower, mm_hidden_size=vision.hidden_size)
    values.update(settings)
    config = strict_config(lambda: config_class(**values, vision_config=vision.to_dict()))
    if skip_vision is not None:
        config.skip_vision = with_family_budget(config, skip_vision)
    check_config(config, vision.to_dict())
    return config


def _refuse_unknown(settings: dict[str, Any], config_class: type[LlavaFields]) -> None:
    known = {field.name for field in fields(config_class)}
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UserError(f"unknown model option {', '.join(map(repr, unknown))}; options are the fields of LlavaConfig")


def _read_llm_config(llm: str) -> Any:
    try:
        base = AutoConfig.from_pretrained(llm, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"language model {llm}: cannot read its config.json ({str(error).splitlines()[0]})") from error
    if base.model_type not in DECODERS:
        raise UserError(f"language model {llm}: its model_type is {base.model_type!r}; known: {', '.join(DECODERS)}")
    return base


def _load_on_language_model(
    llm: str, config: LlavaFields, dtype: Any, attn: str | None, placement: dict[str, Any]
) -> LlavaCausalLM:
    """The language model's weights, a fresh projector, and the pretrained encoder."""
    without_tower = copy.deepcopy(config)
    without_tower.vision_config = None
    model = load_strictly(
        model_class(config),
        llm,
        new_weights=("model.mm_projector.",),
        config=without_tower,
        dtype=dtype or "auto",
        attn_implementation=attn,
        **placement,
    )
    projector = model.get_model().mm_projector
    with torch.no_grad(), gathered(list(projector.parameters())):
        projector.reset_projection()
    tower = load_vision_tower(str(config.mm_vision_tower), model.config, dtype=model.dtype)
    model.get_model().attach_vision_tower(tower.to(model.device) if placement else tower)
    return model
