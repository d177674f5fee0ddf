"""What `convert` and `release` share on the command line: mistakes in one line, `--dtype`, `--shard-size`.

Imports nothing heavy: `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from llava_sv.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
"""Types that weights are stored in, by torch's names."""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a `UserError` of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def shard_bytes(text: str) -> int:
    """`5GB` -> bytes, by powers of 1000 as transformers has it (`5GiB`: of 1024). Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i)?B?", text.strip(), re.IGNORECASE)
    base = 1024 if match and match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"--shard-size {text}: cannot be read; write a number and KB, MB or GB, such as 5GB")
    return size
