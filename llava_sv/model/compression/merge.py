"""Token merge (the paper's section 4.1): many local tokens in, the few most distinct ones out, the others averaged in.

G groups (images), n tokens, k kept, C width. Called by the projector on the tokens that are not retained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class MergePlan:
    """kept: [G, k] indices of kept tokens in raster order, `kept_mask` [G, k] says which are real;
    target: [G, n] index into `kept` that each token joins (k where the token is padding)."""

    kept: Tensor
    kept_mask: Tensor
    target: Tensor


@torch.no_grad()
def plan_merge(tokens: Tensor, num_kept: int, mask: Tensor | None = None, each: Tensor | None = None) -> MergePlan:
    """Decide who stays and who joins whom, in float32 and without gradient.

    The `num_kept` tokens with the lowest average cosine similarity to the others stay; each other token joins
    the kept token most similar to it. Ties go to the earlier token. A group with fewer real tokens keeps them all.
    tokens: [G, n, C]; mask: bool [G, n], False for padding; each: [G], how many each group keeps, `num_kept` at most.
    """
    groups, count, _ = tokens.shape
    if mask is None:
        mask = torch.ones(groups, count, dtype=torch.bool, device=tokens.device)
    unit = F.normalize(tokens.float(), dim=-1).masked_fill(~mask.unsqueeze(-1), 0.0)
    with torch.autocast(tokens.device.type, enabled=False):
        similarity = unit @ unit.transpose(1, 2)
    # a token's similarity to itself leaves the sum; the divisor is the same for a whole group and keeps it an average
    own = similarity.diagonal(dim1=1, dim2=2)
    others = (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    average = ((similarity.sum(-1) - own) / others).masked_fill(~mask, torch.inf)

    num_kept = min(num_kept, count)
    kept = average.sort(dim=1, stable=True).indices[:, :num_kept]
    kept_mask = mask.gather(1, kept)
    if each is not None:
        kept_mask = kept_mask & (torch.arange(num_kept, device=tokens.device) < each.unsqueeze(1))
    # padding sorts last, real tokens by raster position
    kept = kept.masked_fill(~kept_mask, count).sort(dim=1).values
    kept_mask = kept < count
    slot = torch.arange(num_kept, device=tokens.device).expand(groups, -1)
    # a kept token joins itself, whatever rounding says of a twin; the extra column swallows padding
    own_slot = kept.new_full((groups, count + 1), -1).scatter(1, kept, slot)[:, :count]
    kept = kept.clamp(max=count - 1)

    to_kept = similarity.gather(2, kept.unsqueeze(1).expand(-1, count, -1))
    to_kept = to_kept.masked_fill(~kept_mask.unsqueeze(1), -torch.inf)
    # argmax promises no order among ties: the first slot that reaches the maximum is the earlier token
    nearest = (to_kept == to_kept.amax(dim=2, keepdim=True)).to(torch.int8).argmax(dim=2)
    target = torch.where(own_slot >= 0, own_slot, nearest)
    return MergePlan(kept, kept_mask, target.masked_fill(~mask, num_kept))


def apply_merge(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Mean of each kept token and those that joined it: [G, n, C] -> [G, k, C]. Gradients flow through the means.

    Rows where `plan.kept_mask` is False are zero.
    """
    groups, _, width = tokens.shape
    slots = plan.kept.shape[1] + 1
    # float32 sums: a bf16 running sum over hundreds of tokens loses what it adds
    sums = tokens.new_zeros(groups, slots, width, dtype=_accumulator(tokens.dtype))
    sums = sums.scatter_add(1, plan.target.unsqueeze(-1).expand(-1, -1, width), tokens.to(sums.dtype))
    counts = torch.zeros(groups, slots, dtype=sums.dtype, device=tokens.device)
    counts = counts.scatter_add(1, plan.target, torch.ones_like(plan.target, dtype=sums.dtype))
    means = sums[:, :-1] / counts[:, :-1].clamp(min=1).unsqueeze(-1)
    return means.to(tokens.dtype)


def merge_tokens(
    tokens: Tensor, num_kept: int, mask: Tensor | None = None, each: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge [G, n, C] down to [G, k, C]; also returns bool [G, k], False where a group has fewer."""
    plan = plan_merge(tokens, num_kept, mask, each)
    return apply_merge(tokens, plan), plan.kept_mask


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
