"""The language model's tokenizer, with a padding token whatever it came with."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from llava_sv.errors import UserError, in_words
from llava_sv.files import read_json
from llava_sv.mm_utils import set_pad_token
from llava_sv.model.config import LlavaConfig
from llava_sv.model.llava_layout import find_file


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer at `path`. A missing pad token is set and said; no token is added to the vocabulary."""
    tokenizer = read_tokenizer(path)
    set_pad_token(tokenizer, path)
    return tokenizer


def read_tokenizer(path: str) -> Any:
    """The same as its files have it: nothing set."""
    try:
        return AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False, **_read_as(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"tokenizer {path}: cannot be loaded ({in_words(error)})") from error


def _read_as(path: str) -> dict[str, Any]:
    """transformers takes LLaVA's older `model_type`, `llava`, for its own model and would not read a sentencepiece
    tokenizer as LLaMA's."""
    file = find_file(path, "config.json")
    values = read_json(file, "the download again") if file else None
    older = isinstance(values, dict) and values.get("model_type") == "llava" and "mm_vision_tower" in values
    return {"config": LlavaConfig()} if older else {}
