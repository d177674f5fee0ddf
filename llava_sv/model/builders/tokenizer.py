"""The language model's tokenizer, with a padding token whatever it came with."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from llava_sv.errors import UserError
from llava_sv.mm_utils import set_pad_token


def load_tokenizer(path: str) -> Any:
    """The fast tokenizer at `path`. A missing pad token is set and said; no token is added to the vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    set_pad_token(tokenizer, path)
    return tokenizer
