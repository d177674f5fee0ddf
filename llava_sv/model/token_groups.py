"""What a projector hands on: an image's visual tokens in sequence order, each with its role.

Made by `multimodal_projector`, laid into the sequence by `splice`; everything after reads roles, never offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class TokenRole(IntEnum):
    """What a position of the spliced sequence is (the paper's section 4)."""

    PAD = 0
    TEXT = 1
    SUMMARY = 2
    RETAINED = 3
    FINE = 4
    """A retained token of the middle scale (CoS), which a KV level may drop."""
    SKIPPED = 5


KV_LEVELS: dict[str, tuple[TokenRole, ...]] = {
    "none": (),
    "skipped": (TokenRole.SKIPPED,),
    "fine+skipped": (TokenRole.FINE, TokenRole.SKIPPED),
}
"""Skip KV-cache levels (Table 7): the roles whose keys and values leave the cache after prefill."""


@dataclass
class TokenGroups:
    """The visual tokens of one image (all of its tiles or scales).

    tokens: [n, C], in sequence order. roles: [n], `TokenRole` values (int8).
    """

    tokens: Tensor
    roles: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


def passes_ffn(roles: Tensor) -> Tensor:
    """bool mask of the positions whose FFN runs: TEXT, SUMMARY, RETAINED and FINE (equations 4 and 5)."""
    return (roles != TokenRole.PAD) & (roles != TokenRole.SKIPPED)


def is_visual(roles: Tensor) -> Tensor:
    """bool mask of the positions that came from an image, summaries included."""
    return roles > TokenRole.TEXT


def role_row(parts: list[tuple[TokenRole, int]], device: torch.device) -> Tensor:
    """[n] int8: `count` times each role, in order."""
    return torch.tensor([int(role) for role, count in parts for _ in range(count)], dtype=torch.int8, device=device)
