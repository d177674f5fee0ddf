"""Parameters that ZeRO-3 has partitioned, whole for a moment. Called where weights are read or written by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters inside, also under ZeRO-3 (rank 0's changes are broadcast); a no-op without it."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    deepspeed: Any = sys.modules["deepspeed"]  # whoever partitioned them has imported it
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield
