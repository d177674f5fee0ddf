"""`load_pretrained_model`: a checkpoint of this project or LLaVA's in, (tokenizer, model, image processor, length) out.

What to build is read from config.json, never from a name.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch

from llava_sv.errors import UserError
from llava_sv.mm_utils import load_image_processor
from llava_sv.model import adapters
from llava_sv.model.attention import check_attn_implementation
from llava_sv.model.builders import build_model
from llava_sv.model.builders.tokenizer import load_tokenizer
from llava_sv.model.checkpoint_io import COME_AND_GO, PROJECTOR_KEY
from llava_sv.model.config import LlavaFields
from llava_sv.model.language_model.causal_lm import LlavaCausalLM
from llava_sv.model.llava_layout import WEIGHTS, find_file, is_foreign
from llava_sv.model.loading import is_llava, load_whole, read_config, read_config_json
from llava_sv.model.quantization import quantized

SET_BY_BUILDER = (
    "mm_family",
    "mm_vision_tower",
    "vision_config",
    "mm_hidden_size",
    "skip_vision",
    "tokenizer_padding_side",
)
"""Fields that building a model sets by itself, or that only training reads."""

KEPT_ON_BASE = tuple(field.name for field in fields(LlavaFields) if field.name not in SET_BY_BUILDER)
"""Fields that a projector-only checkpoint brings to its language model."""


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    torch_dtype: Any = None,
    allow_new_weights: tuple[str, ...] = (),
    merge_lora: bool | None = None,
    vision_tower: str | None = None,
) -> tuple[Any, LlavaCausalLM, Any, int]:
    """Load a checkpoint for inference: (tokenizer, model, image_processor, context_len).

    model_path: a folder or hub name whose config.json tells what to build; a folder that pretraining wrote (a
    projector alone) needs `model_base`, its language model; one that LoRA training wrote takes `model_base`, or the
    model that it remembers. model_name is accepted for LLaVA's callers and not read.
    allow_new_weights: key prefixes that may be absent and then start fresh; anything else absent is a `UserError`.
    merge_lora: add adapters to the weights they adapt; default: yes, but for a quantised base, where they stay beside.
    vision_tower: where the encoder lies that the checkpoint names and does not hold; default: where the name says.
    """
    check_attn_implementation(attn_implementation)
    config = read_config(model_path, vision_tower)
    if merge_lora and (load_8bit or load_4bit):
        raise UserError("merge_lora: adapters cannot be added to quantised weights; drop one of them")
    quantization = quantized(load_8bit, load_4bit)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    placement: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    if quantization or (device == "cuda" and device_map):
        placement["device_map"] = device_map
    if adapters.is_adapter(model_path):
        tokenizer, model, image_processor = _load_adapters(
            model_path, model_base, config, torch_dtype, attn_implementation, placement
        )
        if merge_lora or (merge_lora is None and quantization is None):
            adapters.merge(model)
    elif is_projector_only(model_path):
        if quantization:
            raise UserError(f"checkpoint {model_path}: a projector alone cannot be loaded with load_8bit or load_4bit")
        tokenizer, model, image_processor = _load_on_base(
            model_path, model_base, config, torch_dtype, attn_implementation
        )
    else:
        model = load_whole(model_path, config, allow_new_weights, torch_dtype, attn_implementation, **placement)
        tokenizer = load_tokenizer(model_path)
        image_processor = load_image_processor(processor_source(model_path, config), config.mm_vision_image_size)
    if quantization is None and not hasattr(model, "hf_device_map"):
        model.to(device)  # type: ignore[arg-type]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    context_len = config.tokenizer_model_max_length or config.max_position_embeddings
    return tokenizer, model.eval(), image_processor, context_len


def processor_source(path: str, config: LlavaFields) -> str:
    """Where a checkpoint's image processor lies: with it, or with the encoder that it names."""
    return path if find_file(path, "preprocessor_config.json") else str(config.mm_vision_tower)


def is_projector_only(path: str) -> bool:
    """Whether a folder holds a projector and no language model."""
    if not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in WEIGHTS):
        return False
    return any(os.path.isfile(os.path.join(path, f"mm_projector.{kind}")) for kind in ("bin", "safetensors"))


def _load_on_base(
    path: str, base: str | None, config: LlavaFields, dtype: Any, attn: str | None
) -> tuple[Any, Any, Any]:
    if base is None:
        raise UserError(f"checkpoint {path}: holds a projector alone; name its language model with --model-base")
    return _build_on_base(base, config, dtype, attn, pretrain_mm_mlp_adapter=path)


def _build_on_base(
    base: str, config: LlavaFields, dtype: Any, attn: str | None, **options: Any
) -> tuple[Any, Any, Any]:
    """The LLaVA that `config` describes over the language model `base`."""
    return build_model(
        config.mm_family,
        llm=base,
        vision_tower=config.mm_vision_tower or "",
        skip_vision=config.skip_vision.to_dict() if config.skip_vision else None,
        torch_dtype=dtype,
        attn_implementation=attn,
        **options,
        **{name: getattr(config, name) for name in KEPT_ON_BASE},
    )


def _load_adapters(
    path: str, base: str | None, config: LlavaFields, dtype: Any, attn: str | None, placement: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Adapters over their base, which is a language model or a whole LLaVA, with what trained beside them."""
    base = adapters.base_of(path, base)
    _, values = read_config_json(base)
    adapters.check_base(path, base, config, values)
    whole = is_llava(values)
    if whole:
        if is_foreign(values):
            config.vision_config = read_config(base, config.mm_vision_tower).vision_config
        elif values.get("vision_config") is None:
            config.vision_config = None
        other = tuple(f"model.{PROJECTOR_KEY}{key}" for key in COME_AND_GO)
        model = load_whole(base, config, other, dtype, attn, unused_weights=other, **placement)
    else:
        _, model, _ = _build_on_base(base, config, dtype, attn, placement=placement)
    adapters.attach_saved(model, path, whole_projector=not whole)
    own = any(os.path.isfile(os.path.join(path, name)) for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(path if own else base)
    return tokenizer, model, load_image_processor(processor_source(path, config), config.mm_vision_image_size)
