"""Which patches stay whole: encoder features in, indices of retained and other patches out. Called by the projector.

V views, N patches, E encoder width. Scores need one row of attention or one sum; no N x N map is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_sv.errors import UserError


@dataclass
class VisionFeatures:
    """What the encoder hands on. patches: [V, N, E] (N + 1 with `cls_patch`); cls: [V, E], None without a CLS token;
    cls_attention, pool_attention: [V, N] attention of CLS or of the pooling head to each patch, summed over heads, None
    where no selector asked for it; levels: [V, N, E] of each of `mm_vision_feature_levels`, the last being `patches`,
    or None where none are asked for."""

    patches: Tensor
    cls: Tensor | None = None
    cls_attention: Tensor | None = None
    pool_attention: Tensor | None = None
    levels: list[Tensor] | None = None

    def to(self, device: torch.device) -> VisionFeatures:
        """The same features on `device`."""
        return self._map(lambda part: part.to(device))

    def rows(self, index: Tensor) -> VisionFeatures:
        """The features of the views that `index` [n] names."""
        return self._map(lambda part: part[index])

    def _map(self, change: Callable[[Tensor], Tensor]) -> VisionFeatures:
        def of(part: Tensor | None) -> Tensor | None:
            return None if part is None else change(part)

        levels = None if self.levels is None else [change(level) for level in self.levels]
        return VisionFeatures(
            change(self.patches), of(self.cls), of(self.cls_attention), of(self.pool_attention), levels
        )


def cls_similarity(features: VisionFeatures) -> Tensor:
    """Cosine of each patch with the CLS feature of the same layer, [V, N] float32 (the paper's section 4.1)."""
    if features.cls is None:
        raise ValueError("selection 'cls_similarity' needs the encoder's CLS feature, and this encoder gave none")
    return F.cosine_similarity(features.patches.float(), features.cls.float().unsqueeze(1), dim=-1)


def cls_attention(features: VisionFeatures) -> Tensor:
    """Attention of the CLS token to each patch, summed over heads, [V, N] float32."""
    if features.cls_attention is None:
        raise ValueError("selection 'cls_attention' needs the encoder's CLS attention, and this encoder gave none")
    return features.cls_attention.float()


def pool_attention(features: VisionFeatures) -> Tensor:
    """Attention of the pooling head's probe to each patch, summed over heads, [V, N] float32."""
    if features.pool_attention is None:
        raise ValueError("selection 'pool_attention' needs the encoder's pooling head, and this encoder gave none")
    return features.pool_attention.float()


def distinctiveness(features: VisionFeatures) -> Tensor:
    """Minus each patch's average cosine to the others, [V, N] float32: those unlike the rest are retained.

    The cosines of a patch to all add up to its dot product with the sum of unit vectors.
    """
    unit_VNE = F.normalize(features.patches.float(), dim=-1)
    to_all = (unit_VNE * unit_VNE.sum(dim=1, keepdim=True)).sum(dim=-1)
    to_itself = unit_VNE.square().sum(dim=-1)
    return (to_itself - to_all) / max(unit_VNE.shape[1] - 1, 1)


SELECTORS: dict[str, Callable[[VisionFeatures], Tensor]] = {
    "cls_similarity": cls_similarity,
    "cls_attention": cls_attention,
    "pool_attention": pool_attention,
    "distinctiveness": distinctiveness,
}

NEEDS: dict[str, str] = {"cls_similarity": "CLS token", "cls_attention": "CLS token", "pool_attention": "pooling head"}
"""What a selection reads of the encoder beside its patches; those that are not here work with every encoder."""


def wants_of(selection: str) -> dict[str, bool]:
    """What to ask of the encoder's forward for this selection."""
    return {"with_cls_attention": selection == "cls_attention", "with_pool_attention": selection == "pool_attention"}


def get_selector(name: str) -> Callable[[VisionFeatures], Tensor]:
    """Look a selection up by its exact name; `UserError` lists the known ones."""
    if name not in SELECTORS:
        raise UserError(f"skip_vision.selection: unknown selection {name!r}; known: {', '.join(SELECTORS)}")
    return SELECTORS[name]


@torch.no_grad()
def split_by_score(scores: Tensor, num_retained: int) -> tuple[Tensor, Tensor]:
    """Indices of the `num_retained` highest scores and of the others, both in raster order; ties: the earlier patch.

    scores: [V, N]. Returns [V, num_retained] and [V, N - num_retained].
    """
    if num_retained > scores.shape[1]:
        raise ValueError(f"cannot retain {num_retained} of {scores.shape[1]} patches")
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_retained].sort(dim=1).values, order[:, num_retained:].sort(dim=1).values


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [V, N, C], index [V, n] -> [V, n, C]."""
    rows = tokens.flatten(0, 1).index_select(0, flat_rows(index, tokens.shape[1]))
    return rows.view(*index.shape, tokens.shape[-1])


def flat_rows(index: Tensor, length: int) -> Tensor:
    """index [V, n] into `length` rows of each view -> [V * n] into the rows of all views laid end to end."""
    first = torch.arange(index.shape[0], device=index.device) * length
    return (index + first.unsqueeze(1)).flatten()
