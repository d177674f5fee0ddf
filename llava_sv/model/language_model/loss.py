"""lm_head that can give the loss without the logits: only supervised positions, a chunk at a time.

Called by `causal_lm`. S supervised positions, C width, K vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_sv.constants import IGNORE_INDEX

CHUNK_ELEMENTS = 2**27
"""Logits held at once: 2^27 float32 values are 512 MiB, about 1,000 positions of a 128k vocabulary."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden @ weight.T`; gradients are made chunk by chunk on the way forward.

    No chunk's logits outlive it, and the backward pass needs no collective: ranks with unequal numbers of chunks
    stay in step under ZeRO-3, because the weight is gathered once around the whole.
    """

    @staticmethod
    def forward(ctx, hidden_SC: Tensor, weight_KC: Tensor, targets_S: Tensor, with_grad: bool) -> Tensor:
        wants_hidden, wants_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden_SC.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_SC.device)
        grad_hidden = torch.empty_like(hidden_SC) if wants_hidden else None
        grad_weight: Tensor | None = None
        for hidden, targets, rows in _chunks(hidden_SC, targets_S, step=max(CHUNK_ELEMENTS // weight_KC.shape[0], 1)):
            log_probs = (hidden @ weight_KC.T).to(wide).log_softmax(dim=-1)
            total -= log_probs.gather(1, targets.unsqueeze(1)).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(1, targets.unsqueeze(1), grad_logits.new_full((targets.shape[0], 1), -1.0))
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight_KC, out=grad_hidden[rows])
            if wants_weight:
                grad_weight = narrow.T @ hidden if grad_weight is None else grad_weight.addmm_(narrow.T, hidden)
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_KC)
        ctx.gradients = [grad_hidden, grad_weight]
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass; run the forward pass again")
        # scaled in place: a vocabulary's gradient is the largest tensor of the step, a copy would double it
        scaled = [
            None if gradient is None else gradient.mul_(grads[0].to(gradient.dtype)) for gradient in ctx.gradients
        ]
        ctx.gradients = None
        return scaled[0], scaled[1], None, None


def _chunks(hidden_SC: Tensor, targets_S: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    for start in range(0, hidden_SC.shape[0], step):
        rows = slice(start, start + step)
        yield hidden_SC[rows], targets_S[rows], rows


class LMHead(nn.Linear):
    """An output layer that is called once a forward, for logits or for the loss."""

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        """[..., C] -> logits [..., K]; with `labels` [S] and input [S, C] -> their summed cross entropy.

        `labels` may hold no `IGNORE_INDEX`; an empty S gives zero, with zero gradients for every parameter.
        """
        if labels is None:
            return F.linear(input, self.weight, self.bias)
        if self.bias is not None:
            raise ValueError("the chunked loss is for output layers without bias")
        kind, weight = input.device.type, self.weight
        if torch.is_autocast_enabled(kind):
            input, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (input, weight))
        with torch.autocast(kind, enabled=False):
            return _ChunkedCrossEntropy.apply(input, weight, labels, torch.is_grad_enabled())


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices [S] into [B, T] of the positions that predict a supervised token, and the tokens [S]."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    rows = (targets != IGNORE_INDEX).nonzero().flatten()
    return rows, targets[rows]
