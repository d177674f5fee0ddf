"""The language model's tokenizer, with a padding token whatever it came with."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoTokenizer

from llava_sv.errors import UserError
from llava_sv.files import read_json
from llava_sv.model.config import LlavaConfig
from llava_sv.model.llava_layout import find_file

logger = logging.getLogger(__name__)

PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<pad>", "[PAD]", "<unk>")
"""Tokens that a LLaMA vocabulary may hold and that never occur in text, best first."""


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer at `path`. A missing pad token is set and said; no token is added to the vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False, **_read_as(path))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        pad = next((token for token in PAD_CANDIDATES if token in vocabulary), tokenizer.eos_token)
        if pad is None:
            raise UserError(f"tokenizer {path}: has no pad token, and no unk or eos token to stand in; add a pad token")
        tokenizer.pad_token = pad
        logger.warning("tokenizer %s has no pad token: %r is used for padding", path, pad)
    return tokenizer


def _read_as(path: str) -> dict[str, Any]:
    """transformers takes LLaVA's older `model_type`, `llava`, for its own model and would not read a sentencepiece
    tokenizer as LLaMA's."""
    file = find_file(path, "config.json")
    values = read_json(file, "the download again") if file else None
    older = isinstance(values, dict) and values.get("model_type") == "llava" and "mm_vision_tower" in values
    return {"config": LlavaConfig()} if older else {}
