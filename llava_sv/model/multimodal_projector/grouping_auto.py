"""Grouping where each image retains as many tokens as its content asks for (`num_retained: auto`), LLaVA family.

Every image's tokens are laid out with room for the most of each role, and what is empty is moved to the end and cut
off: all images come out equally long (see `retained_budget`), and no loop runs over tokens.
V views (one an image), N patches, C LLM width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_sv.model.compression.adaptive import choose_counts, raster_split
from llava_sv.model.compression.merge import merge_tokens
from llava_sv.model.compression.select import VisionFeatures, gather_tokens, get_selector
from llava_sv.model.compression.summary import SummaryTokens
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.token_groups import TokenGroups, TokenRole

Part = tuple[Tensor, Tensor, Tensor]
"""Tokens [V, n, C], whether each is there [V, n], and its role [V, n]."""


def group_by_content(
    tokens: Tensor, features: VisionFeatures, skip: SkipVisionConfig, summary: SummaryTokens
) -> list[TokenGroups]:
    """[retained][former summary][skipped][latter summary] of each image, the counts its own. tokens: [V, N, C]."""
    patches = tokens.shape[1]
    together = skip.mean_retained + skip.skipped_of(patches)
    scores = get_selector(skip.selection)(features)
    counts = choose_counts(scores, skip)
    order, column = raster_split(scores, counts), torch.arange(patches, device=tokens.device)
    is_retained = column < counts.unsqueeze(1)
    least, most = int(skip.retained_min or 0), int(skip.retained_max or 0)
    retained, retained_mask = gather_tokens(tokens, order[:, :most]), is_retained[:, :most]
    skipped, skipped_mask = gather_tokens(tokens, order[:, least:]), ~is_retained[:, least:]
    if skip.merge:
        skipped, skipped_mask = merge_tokens(skipped, together - least, skipped_mask, together - counts)

    parts = [_part(retained, retained_mask, TokenRole.RETAINED)]
    if summary.former is not None:
        parts.append(_one(summary.former(retained, retained_mask)))
    parts.append(_part(skipped, skipped_mask, TokenRole.SKIPPED))
    if skip.last_visual_ffn:
        place = torch.arange(skipped.shape[1], device=tokens.device)
        last = torch.where(skipped_mask, place, -1).amax(dim=1, keepdim=True)
        parts[-1][2].masked_fill_(place == last, int(TokenRole.RETAINED))
    if summary.latter is not None:
        parts.append(_one(summary.latter(skipped, skipped_mask)))
    return _laid_out(parts, together + skip.summaries())


def _part(tokens: Tensor, mask: Tensor, role: TokenRole) -> Part:
    return tokens, mask, torch.full(mask.shape, int(role), dtype=torch.int8, device=tokens.device)


def _one(pooled: Tensor) -> Part:
    """A summary [V, C] as a part."""
    there = torch.ones(pooled.shape[0], 1, dtype=torch.bool, device=pooled.device)
    return _part(pooled.unsqueeze(1), there, TokenRole.SUMMARY)


def _laid_out(parts: list[Part], length: int) -> list[TokenGroups]:
    """The `length` tokens that each image has, in order, without the empty places between them."""
    tokens, mask, roles = (torch.cat(of_all, dim=1) for of_all in zip(*parts))
    index = (~mask).to(torch.int8).sort(dim=1, stable=True).indices[:, :length]
    laid, roles = gather_tokens(tokens, index), roles.gather(1, index)
    return [TokenGroups(view, own) for view, own in zip(laid, roles)]
