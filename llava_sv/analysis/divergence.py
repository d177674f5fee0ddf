"""One sequence walked twice, with the FFN for all tokens and without it for skipped ones: what each layer adds to the
difference, how it is amplified, and what of it arrives at the next-token distribution. Called by `error_bound`.

x is the full trajectory, y the skipping one; both start from the same embeddings. T length, C width, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_sv.analysis.common import Job, Sample
from llava_sv.analysis.gains import LocalMap, gain_along
from llava_sv.analysis.lipschitz import LayerNorms, layer_constant, norm_constant
from llava_sv.analysis.trajectory import Walk, differentiable_attention, kl, length_of
from llava_sv.model.token_groups import TokenRole, is_visual

POINTS = (0.0, 0.5, 1.0)
"""Where on the segment from y to x derivatives are taken."""


@dataclass(frozen=True)
class Plan:
    """What is measured. skips: layers that skip; norms: of each layer's matrices, None to leave operator norms out;
    iterations: of the power iteration on a layer's Jacobian, 0 to leave derivatives out; sigma: see `outputs`."""

    skips: frozenset[int]
    norms: list[LayerNorms] | None
    iterations: int
    sigma: float | None = None


def measure(walk: Walk, plan: Plan) -> dict[str, np.ndarray]:
    """Arrays of one sequence, by name.

    [L]: `skip_error` e_l, the length of what skipped tokens miss (8); `skip_error_token` its mean over them, and
    `skip_error_relative` that over their own lengths; `gain_secant`, `gain_operator` (with `gain_attention` and
    `gain_ffn`), `gain_jvp`, `gain_jvp_norm`, NaN where x and y are still one. [L + 1]: `error`, the length of x - y
    before each layer and after the last; `error_skipped`, `error_kept` and `error_last`, its share in skipped tokens,
    the others, the last one; `hidden`, `hidden_kept` and `hidden_last`, the length of x. []: `last_passes`, 1 where the
    last position passes the FFN (not so where a prompt ends with a skipped token). And `outputs`.
    """
    count = len(walk.layers)
    names = ["skip_error", "skip_error_token", "skip_error_relative"]
    gains = ["secant", "operator", "attention", "ffn", "jvp", "jvp_norm"]
    per_layer = {name: np.full(count, np.nan) for name in [*names, *(f"gain_{gain}" for gain in gains)]}
    states = []
    x = y = walk.embeds
    for index in range(count):
        states.append(_lengths(walk, x, y))
        with torch.no_grad():
            full = walk.layer(index, x)
            attended = walk.attend(index, y)
            ffn = walk.ffn(index, attended)
            same = skipping = attended + ffn
            if index in plan.skips:
                skipping = torch.where(walk.skipped.unsqueeze(-1), attended, same)
        found = {"skip_error": length_of(same - skipping), **_missed(walk, attended, ffn, index in plan.skips)}
        if not torch.equal(x, y):
            found["gain_secant"] = length_of(full - same) / length_of(x - y)
            found |= _constants(walk, index, plan, x, y)
        for name, value in found.items():
            per_layer[name][index] = value
        x, y = full, skipping
    states.append(_lengths(walk, x, y))
    per_state = {name: np.array([state[name] for state in states]) for name in states[0]}
    last = {"last_passes": np.array(float(walk.passes[-1]))}
    return {**per_layer, **per_state, **last, **outputs(walk, x[-1], y[-1], plan.sigma)}


def _lengths(walk: Walk, x: Tensor, y: Tensor) -> dict[str, float]:
    gap, kept = x - y, walk.passes
    return {
        "error": length_of(gap),
        "error_skipped": length_of(gap[~kept]),
        "error_kept": length_of(gap[kept]),
        "error_last": length_of(gap[-1]),
        "hidden": length_of(x),
        "hidden_kept": length_of(x[kept]),
        "hidden_last": length_of(x[-1]),
    }


def _missed(walk: Walk, attended: Tensor, ffn: Tensor, skips: bool) -> dict[str, float]:
    """e_l token by token: what a skipped token misses, by itself and beside what it keeps."""
    if not skips:
        return {"skip_error_token": 0.0, "skip_error_relative": 0.0}
    missed = ffn[walk.skipped].double().norm(dim=-1)
    kept = attended[walk.skipped].double().norm(dim=-1)
    return {"skip_error_token": float(missed.mean()), "skip_error_relative": float((missed / kept).mean())}


def _constants(walk: Walk, index: int, plan: Plan, x: Tensor, y: Tensor) -> dict[str, float]:
    found = {}
    if plan.norms is not None:
        constant = layer_constant(walk, index, plan.norms[index], x, y)
        found = {
            "gain_operator": constant["total"],
            "gain_attention": constant["attention"],
            "gain_ffn": constant["ffn"],
        }
    if plan.iterations:
        gap = x - y
        with differentiable_attention():
            along = [gain_along(lambda h: walk.layer(index, h), y + share * gap, gap) for share in POINTS]
            middle = LocalMap(lambda h: walk.layer(index, h), y + 0.5 * gap)
            found |= {"gain_jvp": max(along), "gain_jvp_norm": middle.norm(gap, plan.iterations)}
    return found


@torch.no_grad()
def outputs(walk: Walk, x: Tensor, y: Tensor, sigma: float | None = None) -> dict[str, np.ndarray]:
    """Numbers [] of the next-token distribution, from the last position x and y [C]: `kl`, of the softmax, skipping
    against full; `logit_error` and `logit_range`, the length and the range of the logits' difference; `sigma`, given
    or else the standard deviation of the full logits over the vocabulary; `final_norm`, the constant of the last norm;
    `same_token`, whether both put the same token first."""
    z, skipping = walk.logits(x).double(), walk.logits(y).double()
    gap = skipping - z
    numbers = {
        "kl": kl(skipping, z),
        "logit_error": length_of(gap),
        "logit_range": float(gap.max() - gap.min()),
        "sigma": float(z.std(correction=0)) if sigma is None else sigma,
        "final_norm": norm_constant(walk.model.get_model().norm, x.unsqueeze(0), y.unsqueeze(0)),
        "same_token": float(z.argmax() == skipping.argmax()),
    }
    return {name: np.array(value) for name, value in numbers.items()}


@torch.no_grad()
def similarity_error(job: Job, sample: Sample, walk: Walk) -> dict[str, np.ndarray]:
    """(13)'s term: `theta`, the mean cosine of the visual tokens that merging replaced to what stands for them, the
    nearest token of the sequence; `similarity_error`, sqrt(2 (1 - theta)) times their root mean square length, which
    is the root mean square distance of tokens of one length at that cosine. 1 and 0 where none was replaced."""
    model = job.model
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    views = [image if image.dim() == 4 else image.unsqueeze(0) for image in sample.batch.images or []]
    features = tower(torch.cat([view.to(tower.device, tower.dtype) for view in views]))
    dense = projector.tokens_of(features).flatten(0, 1).double()
    standing = walk.embeds[is_visual(walk.roles) & (walk.roles != TokenRole.SUMMARY)].double()
    cosine = F.normalize(dense, dim=-1) @ F.normalize(standing, dim=-1).T
    best = cosine.amax(1)
    replaced = best < 1 - 1e-9
    if not bool(replaced.any()):
        return {"theta": np.array(1.0), "similarity_error": np.array(0.0)}
    theta = float(best[replaced].mean())
    size = float(dense[replaced].norm(dim=-1).pow(2).mean().sqrt())
    return {"theta": np.array(theta), "similarity_error": np.array(math.sqrt(2 * (1 - theta)) * size)}
