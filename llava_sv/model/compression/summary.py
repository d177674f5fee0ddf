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
        """tokens [G, n, C], bool mask [G, n] (False is padding; each group needs a real token) -> [G, C]."""
        scored = tokens if self.norm is None else self.norm(tokens)
        scores = (scored @ self.weight).float() if tokens.dtype != torch.float64 else scored @ self.weight
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        share = scores.softmax(dim=-1).to(tokens.dtype)
        return torch.einsum("gn,gnc->gc", share, tokens)


class SummaryTokens(nn.Module):
    """The summary weights of a model, one for each end: `former` pools retained tokens, `latter` skipped ones."""

    def __init__(self, width: int, former: bool, latter: bool, norm: str = "none"):
        super().__init__()
        self.former = SummaryToken(width, norm) if former else None
        self.latter = SummaryToken(width, norm) if latter else None
