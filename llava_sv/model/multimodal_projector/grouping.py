"""From projected patches to each image's `TokenGroups`: the LLaVA family's way, and what all families share.

V views, N patches, C LLM width. The other families' are in `grouping_hd` and `grouping_cos`; `families` names them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from llava_sv.model.compression.merge import merge_tokens
from llava_sv.model.compression.select import VisionFeatures, gather_tokens, get_selector, split_by_score
from llava_sv.model.compression.summary import SummaryTokens
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.multimodal_projector.grouping_auto import group_by_content
from llava_sv.model.token_groups import TokenGroups, TokenRole, role_row


class Projecting(Protocol):
    """What a grouping needs of the projector that calls it. `skip` None: dense, everything is retained."""

    config: Any
    skip: SkipVisionConfig | None
    summary: SummaryTokens | None
    image_newline: Tensor | None


Sizes = list[tuple[int, int]] | None
"""(width, height) in pixels of each image as it came, or None where nobody knows."""

Parts = list[tuple[TokenRole, Tensor]]


def group_llava(
    owner: Projecting, tokens: Tensor, features: VisionFeatures, views_per_image: list[int], sizes: Sizes
) -> list[TokenGroups]:
    """LLaVA: one view an image. [retained][former summary][skipped][latter summary] (equation 6).

    tokens: [V, N, C] projected patches; features: what they were projected from. Dense: all retained.
    """
    one_view_each(owner, views_per_image)
    skip = owner.skip
    if skip is None:
        return as_groups([(TokenRole.RETAINED, tokens)])
    if skip.adaptive:
        assert owner.summary is not None  # every projector that skips has it
        return group_by_content(tokens, features, skip, owner.summary)
    keep_index, rest_index = split_by_score(get_selector(skip.selection)(features), skip.mean_retained)
    retained = gather_tokens(tokens, keep_index)
    skipped = gather_tokens(tokens, rest_index)
    if skip.merge:
        skipped, _ = merge_tokens(skipped, skip.skipped_of(tokens.shape[1]))
    return as_groups(in_order([(TokenRole.RETAINED, retained)], skipped, owner))


def one_view_each(owner: Projecting, views_per_image: list[int]) -> None:
    """`ValueError` where an image comes in several views, which this family does not take."""
    if any(views != 1 for views in views_per_image):
        raise ValueError(f"family {owner.config.mm_family!r} takes one view an image, got {views_per_image}")


def in_order(retained: Parts, skipped: Tensor, owner: Projecting) -> Parts:
    """The order of equation 6, summaries included. retained: parts [V, n, C]; skipped: [V, Ns, C]."""
    former = latter = None
    if owner.summary is not None and owner.summary.former is not None:
        former = owner.summary.former(torch.cat([part for _, part in retained], dim=1))
    if owner.summary is not None and owner.summary.latter is not None:
        latter = owner.summary.latter(skipped)
    return between(retained, former, skipped, latter, owner.skip)


def between(
    retained: Parts, former: Tensor | None, skipped: Tensor, latter: Tensor | None, skip: SkipVisionConfig | None
) -> Parts:
    """Parts [..., n, C] in the order of equation 6; summaries are [..., C] or None."""
    parts = list(retained)
    if former is not None:
        parts.append((TokenRole.SUMMARY, former.unsqueeze(-2)))
    if skip is not None and skip.last_visual_ffn:
        parts += [(TokenRole.SKIPPED, skipped[..., :-1, :]), (TokenRole.RETAINED, skipped[..., -1:, :])]
    else:
        parts.append((TokenRole.SKIPPED, skipped))
    if latter is not None:
        parts.append((TokenRole.SUMMARY, latter.unsqueeze(-2)))
    return parts


def as_groups(parts: Parts) -> list[TokenGroups]:
    """Parts [V, n, C] with their roles -> one group a view."""
    roles = role_row([(role, part.shape[1]) for role, part in parts], parts[0][1].device)
    return [TokenGroups(view, roles) for view in torch.cat([part for _, part in parts], dim=1)]
