"""From projected patches to each image's `TokenGroups`: one function a family, looked up by `config.mm_family`.

V views, N patches, C LLM width. Called by the projectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava_sv.errors import UserError
from llava_sv.model.compression.merge import merge_tokens
from llava_sv.model.compression.select import VisionFeatures, gather_tokens, get_selector, split_by_score
from llava_sv.model.compression.summary import SummaryTokens
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.token_groups import TokenGroups, TokenRole, role_row


def group_llava(
    tokens: Tensor,
    features: VisionFeatures,
    views_per_image: list[int],
    skip: SkipVisionConfig | None,
    summary: SummaryTokens | None,
) -> list[TokenGroups]:
    """LLaVA: one view an image. [retained][former summary][skipped][latter summary] (equation 6).

    tokens: [V, N, C] projected patches; features: what they were projected from. Dense (`skip` is None): all retained.
    """
    if any(views != 1 for views in views_per_image):
        raise ValueError(f"family 'llava' takes one view an image, got {views_per_image}")
    if skip is None or summary is None:
        roles = role_row([(TokenRole.RETAINED, tokens.shape[1])], tokens.device)
        return [TokenGroups(view, roles) for view in tokens]
    keep_index, rest_index = split_by_score(get_selector(skip.selection)(features), skip.num_retained)
    retained = gather_tokens(tokens, keep_index)
    skipped = gather_tokens(tokens, rest_index)
    if skip.merge:
        skipped, _ = merge_tokens(skipped, skip.skipped_of(tokens.shape[1]))
    laid_out, roles = lay_out(retained, skipped, skip, summary)
    return [TokenGroups(view, roles) for view in laid_out]


def lay_out(retained: Tensor, skipped: Tensor, skip: SkipVisionConfig, summary: SummaryTokens) -> tuple[Tensor, Tensor]:
    """The order of equation 6: [V, Nr, C] and [V, Ns, C] -> [V, n, C] with the summaries, and its roles [n]."""
    parts = [(TokenRole.RETAINED, retained)]
    if summary.former is not None:
        parts.append((TokenRole.SUMMARY, summary.former(retained).unsqueeze(1)))
    if skip.last_visual_ffn:
        parts += [(TokenRole.SKIPPED, skipped[:, :-1]), (TokenRole.RETAINED, skipped[:, -1:])]
    else:
        parts.append((TokenRole.SKIPPED, skipped))
    if summary.latter is not None:
        parts.append((TokenRole.SUMMARY, summary.latter(skipped).unsqueeze(1)))
    roles = role_row([(role, part.shape[1]) for role, part in parts], retained.device)
    return torch.cat([part for _, part in parts], dim=1), roles


Grouping = Callable[
    [Tensor, VisionFeatures, list[int], "SkipVisionConfig | None", "SummaryTokens | None"], list[TokenGroups]
]

GROUPINGS: dict[str, Grouping] = {"llava": group_llava}


def get_grouping(family: str) -> Grouping:
    """Look a family up by its exact name; `UserError` lists the known ones."""
    if family not in GROUPINGS:
        raise UserError(f"mm_family: unknown family {family!r}; known: {', '.join(GROUPINGS)}")
    return GROUPINGS[family]
