"""The CoS family's grouping: the resampler's scales, coarse to fine; the first Nr tokens are retained (section 6.1).

V views (one an image), n tokens of all scales, C LLM width.
"""

from __future__ import annotations

from torch import Tensor

from llava_sv.model.compression.merge import merge_tokens
from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.cos_presets import scales_of
from llava_sv.model.multimodal_projector.grouping import Projecting, Sizes, as_groups, in_order, one_view_each
from llava_sv.model.token_counts import fine_of, grid_side
from llava_sv.model.token_groups import TokenGroups, TokenRole


def group_cos(
    owner: Projecting, tokens: Tensor, features: VisionFeatures, views_per_image: list[int], sizes: Sizes
) -> list[TokenGroups]:
    """[coarsest][the other retained scales: FINE][former summary][merged finest scale][latter summary].

    tokens: [V, n, C], coarse to fine. Dense: all retained.
    """
    one_view_each(owner, views_per_image)
    skip = owner.skip
    if skip is None:
        return as_groups([(TokenRole.RETAINED, tokens)])
    coarsest = scales_of(owner.config, grid_side(owner.config))[0].queries
    fine = fine_of(coarsest, skip.mean_retained)
    retained, local = tokens[:, : skip.mean_retained], tokens[:, skip.mean_retained :]
    if skip.merge:
        local, _ = merge_tokens(local, skip.skipped_of(tokens.shape[1]))
    parts = [(TokenRole.RETAINED, retained[:, : skip.mean_retained - fine])]
    if fine:
        parts.append((TokenRole.FINE, retained[:, skip.mean_retained - fine :]))
    return as_groups(in_order(parts, local, owner))
