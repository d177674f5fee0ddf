"""Training's entry as scripts call it: `train.py` with the memory-saving attention that this machine has."""

from __future__ import annotations

import sys

from llava_sv.cluster.ending import in_order
from llava_sv.errors import exit_on_user_error
from llava_sv.train.train import train


def fastest_attention() -> str:
    """flash_attention_2 where flash-attn is installed and there is a GPU for it, else sdpa."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def main(argv: list[str] | None = None) -> int:
    """Train as `argv` says; returns the exit code, or leaves with it (`ending`)."""
    return in_order(lambda: exit_on_user_error(train, attn_implementation=fastest_attention, argv=argv))


if __name__ == "__main__":
    sys.exit(main())
