"""Adaptive summary tokens (equation 6): a group's tokens in, one pooled token out. Owned by the projector.

G groups, n tokens, C LLM width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SummaryToken(nn.Module):
    """`softmax(X w)^T X` with a learned `w` in R^C; zero at the start, which is a plain mean."""

    def __init__(self, width: int, norm: str = "none"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width) if norm == "layernorm" else None

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens [G, n, C], bool mask [G, n] (False is padding; each group needs a real token) -> [G, C].

        Scores and sums are float32 (or wider) at any precision: shares of 1/n rounded to bf16 no longer add up to one.
        """
        wide = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            values = tokens.to(wide)
            scored = values if self.norm is None else self.norm(tokens.to(self.weight.dtype)).to(wide)
            scores = scored @ self.weight.to(wide)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            return torch.einsum("gn,gnc->gc", scores.softmax(dim=-1), values).to(tokens.dtype)


class SummaryTokens(nn.Module):
    """The summary weights of a model, one for each end: `former` pools retained tokens, `latter` skipped ones."""

    def __init__(self, width: int, former: bool, latter: bool, norm: str = "none"):
        super().__init__()
        self.former = SummaryToken(width, norm) if former else None
        self.latter = SummaryToken(width, norm) if latter else None
