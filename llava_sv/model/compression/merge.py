"""Token merge (the paper's section 4.1): many local tokens in, the few most distinct ones out, the others averaged in.

G groups (images), n tokens, k kept, C width. Called by the projector on the tokens that are not retained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_sv.model.compression.select import flat_rows, gather_tokens

ROUNDING = 1e-6
"""Cosines in float32 that differ by less count as equal."""


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
    num_kept = min(num_kept, count)
    unit = F.normalize(tokens.float(), dim=-1)
    if mask is not None:
        unit = unit.masked_fill(~mask.unsqueeze(-1), 0.0)
    kept, kept_mask = _most_distinct(unit, num_kept, mask, each)

    slot = torch.arange(num_kept, device=tokens.device).expand(groups, -1)
    # a kept token joins itself, whatever rounding says of a twin; the extra column swallows padding
    own_slot = kept.new_full((groups, count + 1), -1).scatter(1, kept, slot)[:, :count]
    kept = kept.clamp(max=count - 1)

    # similarities to the kept tokens alone: those between the others decide nothing any more
    with torch.autocast(tokens.device.type, enabled=False):
        to_kept = unit @ gather_tokens(unit, kept).transpose(1, 2)
    if mask is not None or each is not None:
        to_kept = to_kept.masked_fill(~kept_mask.unsqueeze(1), -torch.inf)
    # the first of equals: the earlier token. A product's columns are not rounded alike, and twins differ by that much
    nearest = (to_kept >= to_kept.amax(dim=2, keepdim=True) - ROUNDING).to(torch.int8).argmax(dim=2)
    target = torch.where(own_slot >= 0, own_slot, nearest)
    return MergePlan(kept, kept_mask, target if mask is None else target.masked_fill(~mask, num_kept))


def _most_distinct(unit: Tensor, num_kept: int, mask: Tensor | None, each: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens with the lowest average cosine to the others, in raster order: indices [G, k] (n where a group keeps
    fewer) and bool [G, k]. unit: [G, n, C] of length one, zero where `mask` is False.

    A token's cosines to all add up to its product with the sum of all: no map of pairs is made. Its cosine to itself
    leaves that sum. The divisor would be the same for a whole group: sums are in the order of averages.
    """
    count = unit.shape[1]
    with torch.autocast(unit.device.type, enabled=False):
        to_all = (unit @ unit.sum(dim=1).unsqueeze(-1)).squeeze(-1)
    to_others = to_all - unit.square().sum(dim=-1)
    if mask is not None:
        to_others = to_others.masked_fill(~mask, torch.inf)
    kept = to_others.sort(dim=1, stable=True).indices[:, :num_kept]
    kept_mask = torch.ones_like(kept, dtype=torch.bool) if mask is None else mask.gather(1, kept)
    if each is not None:
        kept_mask = kept_mask & (torch.arange(num_kept, device=kept.device) < each.unsqueeze(1))
    # padding sorts last, real tokens by raster position
    kept = kept.masked_fill(~kept_mask, count).sort(dim=1).values
    return kept, kept < count


def apply_merge(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Mean of each kept token and those that joined it: [G, n, C] -> [G, k, C]. Gradients flow through the means.

    Rows where `plan.kept_mask` is False are zero.
    """
    groups, _, width = tokens.shape
    slots = plan.kept.shape[1] + 1
    # whole rows, of all groups laid end to end: a row at a time is moved, not an element
    rows = flat_rows(plan.target, slots)
    # float32 sums: a bf16 running sum over hundreds of tokens loses what it adds
    wide = tokens.to(_accumulator(tokens.dtype)).flatten(0, 1)
    sums = wide.new_zeros(groups * slots, width).index_add(0, rows, wide).view(groups, slots, width)
    counts = wide.new_zeros(groups * slots).index_add(0, rows, wide.new_ones(len(rows))).view(groups, slots)
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
