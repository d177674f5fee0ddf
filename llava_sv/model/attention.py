"""Which attention implementations this machine can run, said before a model is built: nothing falls back silently."""

from __future__ import annotations

import torch
from transformers.utils import is_flash_attn_2_available

from llava_sv.errors import UserError

ATTENTIONS = ("eager", "sdpa", "sdpa_varlen", "flash_attention_2", "flex_attention")


def check_attn_implementation(name: str | None) -> None:
    """`UserError` for an unknown implementation, or flash-attn where it is absent. None is transformers' choice."""
    if name is None:
        return
    if name not in ATTENTIONS:
        raise UserError(f"attn_implementation: unknown {name!r}; known: {', '.join(ATTENTIONS)}")
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        why = "flash-attn is not installed" if torch.cuda.is_available() else "flash-attn needs a CUDA device"
        raise UserError(
            f"attn_implementation: flash_attention_2 cannot be used, {why}; install it with "
            "`pip install 'llava-sv[flash]' --no-build-isolation` on a CUDA machine, or use sdpa"
        )
