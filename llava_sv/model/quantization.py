"""8-bit and 4-bit weights of the language model (bitsandbytes); encoder, projector and lm_head keep their precision.

Asked by `builder` for inference and by `train.lora` for training. bitsandbytes is imported nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import is_bitsandbytes_available

from llava_sv.errors import UserError
from llava_sv.extras import how_to_get

KEPT = ("lm_head", "model.mm_projector", "model.vision_tower", "mm_projector", "vision_tower")
"""Modules that are not quantised: by their place from the root on, and (older transformers) by any part of it."""


def needs(what: str) -> None:
    """`UserError` where bitsandbytes cannot be used; `what` asked for it."""
    if not is_bitsandbytes_available():
        raise UserError(f"{what}: quantised weights need bitsandbytes on a CUDA machine: {how_to_get('train-gpu')}")


def quantized(load_8bit: bool = False, load_4bit: bool = False) -> Any:
    """transformers' quantisation settings for inference, or None where neither is asked for. Raises `UserError`."""
    if not (load_8bit or load_4bit):
        return None
    if load_8bit and load_4bit:
        raise UserError("load_8bit and load_4bit exclude each other: choose one")
    needs("8-bit loading" if load_8bit else "4-bit loading")
    if load_4bit:
        return four_bit(torch.bfloat16)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))


def four_bit(compute: torch.dtype, kind: str = "nf4", double: bool = False) -> Any:
    """Four bits: products in `compute`, values as `kind` (nf4, fp4), constants quantised too if `double`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=list(KEPT),
    )
