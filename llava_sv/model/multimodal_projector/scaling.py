"""Compound token scaling of the CoS resampler: weights of a pretrained preset become those of one with more tokens.

Weights of a projector file come in (keys without prefix), weights of the wanted projector leave. Called by the
projectors as a file is loaded. A file says nothing but its shapes; its preset is read off its counts of queries.
P windows a side, q queries a side of one window, E width.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from llava_sv.errors import UserError
from llava_sv.model.cos_presets import PRESETS, Scale

logger = logging.getLogger(__name__)

QUERIES = re.compile(r"scales\.(\d+)\.queries")
LEVELS = re.compile(r"scales\.0\.levels\.(\d+)\.")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """The resampler that weights are for: `name` is its `mm_projector_type`, `scales` are coarse to fine."""

    name: str
    scales: list[Scale]
    width: int
    """E."""
    output: int
    """C: width of the language model."""
    levels: int
    """Feature levels of the encoder that it reads."""


def repeat_queries(queries: Tensor, queries_per_side: int, repeats: int) -> Tensor:
    """[P q, P q, E] -> [P r q, P r q, E]: each window's queries go to all r x r finer windows that lie in it."""
    windows = queries.shape[0] // queries_per_side
    cut = queries.reshape(windows, queries_per_side, windows, queries_per_side, -1)
    finer = cut.repeat_interleave(repeats, dim=0).repeat_interleave(repeats, dim=2)
    side = windows * repeats * queries_per_side
    return finer.reshape(side, side, -1)


def scale_weights(weights: Weights, where: str, wanted: Wanted) -> Weights:
    """`weights` of a resampler's file for the resampler that is `wanted`.

    Scale i takes the file's scale i, or its last: LayerNorms and linear layers as they are, queries repeated onto the
    finer grid of windows. Raises `UserError` for the file of another kind of projector, and where a scale of the file
    has queries that do not divide into the wanted one's.
    """
    sides, mismatch = query_sides(weights), _mismatch(weights, where, wanted.name)
    if not sides:
        raise UserError(f"{mismatch}, which starts from a resampler's file only")
    _check_made_for(weights, mismatch, wanted)
    sources = [min(index, len(sides) - 1) for index in range(len(wanted.scales))]
    repeats = _repeats(sides, sources, wanted.scales)
    if len(sides) > len(wanted.scales) or 0 in repeats:
        raise UserError(
            f"{mismatch} of {_counts(scale.queries for scale in wanted.scales)} queries; compound scaling goes to as "
            "many or more scales, each with as many queries or 4, 9, 16, ... times as many, and as many in each window"
        )
    scaled = {key: value for key, value in weights.items() if not key.startswith("scales.")}
    for index, (source, scale, times) in enumerate(zip(sources, wanted.scales, repeats)):
        prefix = f"scales.{source}."
        for key, value in weights.items():
            if key == prefix + "queries" and times > 1:
                value = repeat_queries(value, scale.queries_per_side, times)
            if key.startswith(prefix):
                scaled[f"scales.{index}.{key.removeprefix(prefix)}"] = value
    if len(sides) != len(sources) or set(repeats) != {1}:
        steps = ", ".join(f"{source} (queries x{times**2})" for source, times in zip(sources, repeats))
        what = f"{kind_of(weights)} scaled to {wanted.name}, whose scales take the scales {steps}"
        logger.info("projector %s: %s", where, what)
    elif wanted.name != kind_of(weights).split(" or ")[0]:
        logger.info("projector %s: %s serves as %s unchanged", where, kind_of(weights), wanted.name)
    return scaled


def _check_made_for(weights: Weights, mismatch: str, wanted: Wanted) -> None:
    """`UserError` where a resampler's file is made for another encoder or language model, which no scaling mends."""
    levels = {match[1] for key in weights if (match := LEVELS.match(key))}
    output = weights.get("proj.weight")
    for what, has, wants in (
        ("an encoder of width", weights["scales.0.queries"].shape[-1], wanted.width),
        ("a language model of width", wanted.output if output is None else output.shape[0], wanted.output),
        ("a number of feature levels (mm_vision_feature_levels) of", len(levels), wanted.levels),
    ):
        if has != wants:
            raise UserError(f"{mismatch}; it is made for {what} {has}, and this one is {wants}: scaling does not apply")


def refuse_resampler(weights: Weights, where: str, wanted: str) -> None:
    """`UserError` where a projector of another kind than the resampler is given a resampler's file."""
    if query_sides(weights):
        raise UserError(f"{_mismatch(weights, where, wanted)}; give the mm_projector_type it was trained with")


def query_sides(weights: Weights) -> list[int]:
    """Side of each scale's map of queries, coarse to fine; empty for what is no resampler's file."""
    found = {int(match[1]): value.shape for key, value in weights.items() if (match := QUERIES.fullmatch(key))}
    shapes = [found.get(index) for index in range(len(found))]
    square = [shape[0] for shape in shapes if shape is not None and len(shape) == 3 and shape[0] == shape[1] > 0]
    return square if len(square) == len(found) else []


def kind_of(weights: Weights) -> str:
    """Which `mm_projector_type` a file is of, in words: by its queries, or by the layers of an MLP."""
    sides = query_sides(weights)
    if sides:
        return " or ".join(_presets_of(sides)) or f"a resampler of {_counts(side**2 for side in sides)} queries"
    layers = [key for key in weights if re.fullmatch(r"\d+\.weight", key)]
    if layers:
        return f"mlp{len(layers)}x_gelu"
    return "linear" if "weight" in weights else "an unknown projector"


def _presets_of(sides: list[int]) -> list[str]:
    """Presets whose scales have maps of queries of these sides."""
    counts = [side**2 for side in sides]
    return [name for name, scales in PRESETS.items() if [queries for _, queries in scales] == counts]


def _repeats(sides: list[int], sources: list[int], scales: list[Scale]) -> list[int]:
    """How often the queries of each scale's source are repeated per axis; 0 where they cannot be.

    sides: of the file's maps of queries; sources: which of them each scale takes. Maps of equal sides are taken as they
    are. A preset's windows are known; those of another file are taken to hold as many queries as the wanted scale's.
    """
    if sides == [math.isqrt(scale.queries) for scale in scales]:
        return [1] * len(scales)
    known = _presets_of(sides)
    repeats = []
    for source, scale in zip(sources, scales):
        side, own = sides[source], scale.queries_per_side
        windows = PRESETS[known[0]][source][0] if known else side // own
        fits = side == windows * own and scale.windows_per_side % windows == 0
        repeats.append(scale.windows_per_side // windows if fits else 0)
    return repeats


def _mismatch(weights: Weights, where: str, wanted: str) -> str:
    return f"projector {where}: it is of mm_projector_type {kind_of(weights)}, and the model wants {wanted}"


def _counts(counts: Iterable[int]) -> str:
    return "+".join(map(str, counts))
