"""What skipping in a given set of layers does to a model's answer: many sets on one sequence, common prefixes walked
once. Called by `layer_plan`. T length, C width, L layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_sv.analysis.trajectory import Walk, kl, length_of

LayerSet = frozenset[int]

MEASURES = ("error", "kl")
"""`error`: of the hidden states after the last layer, in tokens that are not skipped, by their own length; `kl`: of the
next-token distribution after the prompt, skipping against full, in nats."""


@dataclass(frozen=True)
class Outcome:
    """One set of layers on one sequence, by `MEASURES`."""

    error: float
    kl: float


@torch.no_grad()
def outcomes(walk: Walk, sets: Sequence[LayerSet]) -> list[Outcome]:
    """Of each set of layers that skip, in order.

    Sets that agree in their first layers share the walk through them; the smaller branch goes first, so that few
    states of [T, C] are alive at a time.
    """
    ends: dict[LayerSet, tuple[Tensor, Tensor]] = {}  # of the tokens that are not skipped, and of the last one
    todo: list[tuple[int, Tensor, list[LayerSet]]] = [(0, walk.embeds, list({*sets, LayerSet()}))]
    while todo:
        index, hidden, group = todo.pop()
        if index == len(walk.layers):
            ends[group[0]] = hidden[walk.passes], hidden[-1].clone()  # not a view, which keeps all
            continue
        attended = walk.attend(index, hidden)
        passed = attended + walk.ffn(index, attended)
        branches = []
        if skipping := [one for one in group if index in one]:
            branches.append((index + 1, torch.where(walk.skipped.unsqueeze(-1), attended, passed), skipping))
        if others := [one for one in group if index not in one]:
            branches.append((index + 1, passed, others))
        todo += sorted(branches, key=lambda branch: -len(branch[2]))
    full = ends[LayerSet()]
    return [_outcome(walk, full, ends[one]) for one in sets]


def _outcome(walk: Walk, full: tuple[Tensor, Tensor], skipping: tuple[Tensor, Tensor]) -> Outcome:
    error = length_of(full[0] - skipping[0]) / length_of(full[0])
    return Outcome(error, kl(walk.logits(skipping[1]), walk.logits(full[1])))
