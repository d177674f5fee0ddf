"""`load_pretrained_model`: a checkpoint of this project or LLaVA's in, (tokenizer, model, image processor, length) out.

What to build is read from config.json, never from a name.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import torch
from transformers.utils import is_bitsandbytes_available

from llava_sv.errors import UserError
from llava_sv.mm_utils import load_image_processor
from llava_sv.model.attention import check_attn_implementation
from llava_sv.model.builders import build_model
from llava_sv.model.builders.tokenizer import load_tokenizer
from llava_sv.model.config import LlavaFields
from llava_sv.model.language_model.causal_lm import LlavaCausalLM
from llava_sv.model.loading import load_whole, read_config

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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
) -> tuple[Any, LlavaCausalLM, Any, int]:
    """Load a checkpoint for inference: (tokenizer, model, image_processor, context_len).

    model_path: a folder or hub name whose config.json tells what to build; a folder that pretraining wrote (a
    projector alone) needs `model_base`, its language model. model_name is accepted for LLaVA's callers and not read.
    allow_new_weights: key prefixes that may be absent and then start fresh; anything else absent is a `UserError`.
    """
    check_attn_implementation(attn_implementation)
    config = read_config(model_path)
    quantization = _quantization(load_8bit, load_4bit)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if _is_projector_only(model_path):
        if quantization:
            raise UserError(f"checkpoint {model_path}: a projector alone cannot be loaded with load_8bit or load_4bit")
        tokenizer, model, image_processor = _load_on_base(
            model_path, model_base, config, torch_dtype, attn_implementation
        )
    else:
        placement: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
        if quantization or (device == "cuda" and device_map):
            placement["device_map"] = device_map
        model = load_whole(model_path, config, allow_new_weights, torch_dtype, attn_implementation, **placement)
        tokenizer = load_tokenizer(model_path)
        image_processor = load_image_processor(_processor_source(model_path, config), config.mm_vision_image_size)
    if quantization is None and not hasattr(model, "hf_device_map"):
        model.to(device)  # type: ignore[arg-type]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    context_len = config.tokenizer_model_max_length or config.max_position_embeddings
    return tokenizer, model.eval(), image_processor, context_len


def _processor_source(path: str, config: LlavaFields) -> str:
    own = not os.path.isdir(path) or os.path.isfile(os.path.join(path, "preprocessor_config.json"))
    return path if own else str(config.mm_vision_tower)


def _is_projector_only(path: str) -> bool:
    if not os.path.isdir(path) or any(os.path.isfile(os.path.join(path, name)) for name in WEIGHT_FILES):
        return False
    return any(os.path.isfile(os.path.join(path, f"mm_projector.{kind}")) for kind in ("bin", "safetensors"))


def _load_on_base(
    path: str, base: str | None, config: LlavaFields, dtype: Any, attn: str | None
) -> tuple[Any, Any, Any]:
    if base is None:
        raise UserError(f"checkpoint {path}: holds a projector alone; name its language model with --model-base")
    return build_model(
        config.mm_family,
        llm=base,
        vision_tower=config.mm_vision_tower or "",
        skip_vision=config.skip_vision.to_dict() if config.skip_vision else None,
        pretrain_mm_mlp_adapter=path,
        torch_dtype=dtype,
        attn_implementation=attn,
        **{name: getattr(config, name) for name in KEPT_ON_BASE},
    )


def _quantization(load_8bit: bool, load_4bit: bool) -> Any:
    if not (load_8bit or load_4bit):
        return None
    if load_8bit and load_4bit:
        raise UserError("load_8bit and load_4bit exclude each other: choose one")
    if not is_bitsandbytes_available():
        raise UserError(
            "load_8bit and load_4bit need bitsandbytes: `pip install 'llava-sv[train-gpu]'` on a CUDA machine"
        )
    from transformers import BitsAndBytesConfig

    keep = ["lm_head", "mm_projector", "vision_tower"]
    if load_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=keep,
    )
