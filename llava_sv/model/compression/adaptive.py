"""How many patches of an image stay whole: scores in, a count for each view out. Called by the projector (training and
inference alike), and by training once, to find the threshold.

The spread of an image's scores decides. They are standardised and turned into shares (softmax); the fewest patches
that hold the share `retained_threshold` are retained, those of the highest scores, within `retained_min` and
`retained_max`. Where a few patches stand out, few are enough; where many score alike, more stay. Standardising makes
this the same for cosines and for attention, and leaves no temperature to set. A count depends on its own image alone.

V views, N patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_sv.errors import UserError
from llava_sv.model.config import SkipVisionConfig

FLAT = 1e-6
"""Standard deviation below which scores count as equal."""

HALVINGS = 50


@torch.no_grad()
def choose_counts(scores: Tensor, skip: SkipVisionConfig) -> Tensor:
    """Nr of each view, [V] int64, from scores [V, N]. `UserError` where the threshold is not found yet."""
    if skip.retained_threshold is None:
        raise UserError(
            "skip_vision.retained_threshold is not set: training finds it on its images; "
            "or give one (--sv_retained_threshold), a share between 0 and 1"
        )
    return _counts(_shares_before(scores), skip.retained_threshold, skip)


@torch.no_grad()
def raster_split(scores: Tensor, counts: Tensor) -> Tensor:
    """Indices of all patches, [V, N]: the `counts` [V] of the highest scores in raster order, then the others in raster
    order. scores: [V, N]; ties: the earlier patch."""
    ranks = scores.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    is_rest = (ranks >= counts.unsqueeze(1)).to(torch.int8)
    return is_rest.sort(dim=1, stable=True).indices


@torch.no_grad()
def find_threshold(scores: Tensor, skip: SkipVisionConfig) -> tuple[float, Tensor]:
    """The threshold at which views of these scores [V, N] retain `retained_mean` patches on average, as closely as it
    goes; and their counts [V] there."""
    before = _shares_before(scores)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if float(_counts(before, middle, skip).double().mean()) < skip.mean_retained:
            low = middle
        else:
            high = middle
    tries = [(share, _counts(before, share, skip)) for share in (low, high) if 0 < share < 1]
    return min(tries, key=lambda one: abs(float(one[1].double().mean()) - skip.mean_retained))


def _shares_before(scores: Tensor) -> Tensor:
    """[V, N] float32: the share that is held by the patches before each one, in descending order of scores."""
    scores = scores.float()
    with torch.autocast(scores.device.type, enabled=False):
        spread = scores.std(dim=1, correction=0, keepdim=True).clamp(min=FLAT)
        shares = ((scores - scores.mean(dim=1, keepdim=True)) / spread).softmax(dim=1)
        shares = shares.sort(dim=1, descending=True).values
        return shares.cumsum(dim=1) - shares


def _counts(before: Tensor, threshold: float, skip: SkipVisionConfig) -> Tensor:
    """[V] int64: patches that come before the share `threshold` is held, within the bounds."""
    return (before < threshold).sum(dim=1).clamp(skip.retained_min, skip.retained_max)
