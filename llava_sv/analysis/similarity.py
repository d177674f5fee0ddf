"""`llava-sv analyze similarity` (the paper's Figure 5): how alike the visual tokens of one group or scale are.

A checkpoint and pictures arrive. Tokens are the projector's outputs, as merging reads them (section 4.1); two densities
of each group leave, over all pictures:

- `pairs`: the cosine of each pair of distinct tokens of one picture;
- `average`: of each token, the mean cosine to the group's others, itself left out. By it, merging chooses who stays.

Groups: CoS, each scale; LLaVA-HD, the overview and all tiles together; LLaVA, the retained tokens and the others,
before merging (a dense checkpoint: all). Where the checkpoint merges, also `merged`: its skipped tokens after it.
n tokens of a group, C language model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_sv.analysis.common import Job, Results, Sample, make_parser, open_job
from llava_sv.analysis.plots import COLOURS, figure
from llava_sv.analysis.streaming import QUANTILES, Running
from llava_sv.model.compression.select import VisionFeatures, gather_tokens, get_selector, split_by_score
from llava_sv.model.cos_presets import scales_of
from llava_sv.model.multimodal_projector.grouping_hd import tiles_of
from llava_sv.model.token_counts import grid_side
from llava_sv.model.token_groups import TokenGroups, TokenRole

EDGES = np.linspace(-1.0, 1.0, 401)
"""Bins of a cosine, 0.005 wide."""

BLOCK = 1024
"""Rows of the n x n similarities that exist at a time."""

MEASURES = {"pairs": "cosine of two tokens", "average": "a token's average cosine to the others"}

SCALE_COLOURS = (COLOURS["retained"], COLOURS["fine"], COLOURS["skipped"], COLOURS["summary"], COLOURS["other"])
GROUP_COLOURS = {
    "all": COLOURS["visual"],
    "retained": COLOURS["retained"],
    "overview": COLOURS["retained"],
    "skipped": COLOURS["skipped"],
    "tiles": COLOURS["skipped"],
    "merged": COLOURS["summary"],
}

Table = dict[str, dict[str, Running]]
"""Group -> measure -> its values so far."""


def similarities(tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """tokens [n, C] -> block by block of rows: the cosines of pairs i < j [p], and each row's average to the others.

    In float32, as merging computes them. Fewer than two tokens have no pairs and no average.
    """
    count = len(tokens)
    if count < 2:
        return
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    columns = torch.arange(count, device=tokens.device)
    for start in range(0, count, BLOCK):
        rows = columns[start : start + BLOCK]
        block = unit[rows] @ unit.T
        own = block.gather(1, rows.unsqueeze(1)).squeeze(1)
        yield block[columns[None, :] > rows[:, None]], (block.sum(dim=1) - own) / (count - 1)


def groups_of(projector: Any, features: VisionFeatures, sizes: Any, made: TokenGroups) -> dict[str, Tensor]:
    """Group -> tokens [n, C] of one picture. features: the encoder's, of its views; made: what the projector made."""
    config, skip = projector.config, projector.skip
    tokens = projector.tokens_of(features)
    groups: dict[str, Tensor] = {}
    if config.mm_family == "cos":
        scales = scales_of(config, grid_side(config))
        parts = tokens[0].split([scale.queries for scale in scales])
        groups |= {f"window {scale.window}, {scale.queries} tokens": part for scale, part in zip(scales, parts)}
    elif config.mm_family == "llava_hd":
        groups["overview"] = tokens[0]
        groups["tiles"] = tiles_of(projector, tokens, sizes[0] if sizes else None).reshape(-1, tokens.shape[-1])
    elif skip is None:
        groups["all"] = tokens[0]
    else:
        # the last skipped token is called retained where it passes the FFN
        kept = int((made.roles == TokenRole.RETAINED).sum()) - int(skip.last_visual_ffn)
        keep, rest = split_by_score(get_selector(skip.selection)(features), kept)
        groups |= {"retained": gather_tokens(tokens, keep)[0], "skipped": gather_tokens(tokens, rest)[0]}
    if skip is not None and skip.merge:
        groups["merged"] = merged_of(made, skip.last_visual_ffn)
    return groups


def merged_of(made: TokenGroups, last_is_retained: bool) -> Tensor:
    """The tokens [Ns, C] that are skipped, with the last of them where it passes the FFN; none of a picture that has
    nothing to skip."""
    places = (made.roles == TokenRole.SKIPPED).nonzero().flatten()
    if len(places) and last_is_retained:
        places = torch.cat([places, places[-1:] + 1])
    return made.tokens[places]


@torch.no_grad()
def read(job: Job, sample: Sample) -> dict[str, Tensor]:
    """The groups of one picture: the model's own encoder and projector run, and what goes in and out is read."""
    projector = job.model.get_model().mm_projector
    seen: list[Any] = []
    handle = projector.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    try:
        job.model.encode_images(sample.batch.images, sample.batch.image_sizes)
    finally:
        handle.remove()
    (features, _, sizes), (made,) = seen[0]
    return groups_of(projector, features, sizes, made)


def collect(job: Job) -> Table:
    """Every picture's similarities, added up picture by picture."""
    table: Table = {}
    for sample in job.samples("similarity"):
        for group, tokens in read(job, sample).items():
            measured = table.setdefault(group, {name: Running(EDGES) for name in MEASURES})
            for pairs, average in similarities(tokens):
                measured["pairs"].add(pairs.cpu().numpy())
                measured["average"].add(average.cpu().numpy())
    return {group: measured for group, measured in table.items() if measured["pairs"].count}


def arrays_of(table: Table) -> dict[str, np.ndarray]:
    """The .npz: `groups` [G], `edges` [K + 1]; of each measure `NAME_density` [G, K] (of area 1), `NAME_bins` [G, K],
    `NAME_mean` [G], `NAME_quantiles` [G, Q]."""
    arrays = {"groups": np.array(list(table)), "edges": EDGES, "quantiles": np.array(QUANTILES)}
    for name in MEASURES:
        runs = [measured[name] for measured in table.values()]
        arrays[f"{name}_density"] = np.array([run.density() for run in runs])
        arrays[f"{name}_bins"] = np.array([run.bins for run in runs])
        arrays[f"{name}_mean"] = np.array([run.mean for run in runs])
        arrays[f"{name}_quantiles"] = np.array([[run.quantile(share) for share in QUANTILES] for run in runs])
    return arrays


def numbers_of(table: Table, job: Job) -> dict[str, Any]:
    """The .json: facts; of each group, both measures' numbers and its tokens a picture, on average."""
    facts = job.facts()
    groups = {
        group: {
            "tokens_per_image": measured["average"].count / max(facts["images"], 1),
            **{name: measured[name].numbers() for name in MEASURES},
        }
        for group, measured in table.items()
    }
    return {**facts, "groups": groups}


def draw(table: Table, title: str) -> Any:
    """One panel a measure, one density a group, its mean dotted."""
    made, axes = figure(columns=2, width=11.0, height=4.2)
    for axis, (name, words) in zip(axes[0], MEASURES.items()):
        middles = (EDGES[1:] + EDGES[:-1]) / 2
        lowest = min(measured[name].quantile(0.002) for measured in table.values())
        for index, (group, measured) in enumerate(table.items()):
            colour = GROUP_COLOURS.get(group, SCALE_COLOURS[index % len(SCALE_COLOURS)])
            density = smoothed(measured[name].density())
            axis.plot(middles, density, color=colour, label=f"{group} (mean of pairs {measured[name].mean:.2f})")
            axis.fill_between(middles, density, color=colour, alpha=0.15, linewidth=0)
            axis.axvline(measured[name].mean, color=colour, linestyle=":", linewidth=1)
        axis.set_xlabel(words)
        axis.set_xlim(max(lowest - 0.05, -1), 1)
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("density")
    handles, labels = axes[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False, fontsize=8)
    made.suptitle(title, fontsize=11)
    return made


def smoothed(density: np.ndarray, reach: int = 8) -> np.ndarray:
    """For the eye only: each bin the weighted mean of its neighbours (a triangle of `reach` bins, 0.04), cut at the
    ends; the area stays about 1. What is stored is not smoothed."""
    weights = np.bartlett(2 * reach + 1)
    inside = np.convolve(np.ones_like(density), weights, mode="same")
    return np.convolve(density, weights, mode="same") / inside


def main(argv: list[str]) -> int:
    """`llava-sv analyze similarity ...`."""
    parser = make_parser(
        "similarity",
        "How alike the visual tokens of each scale or group are, before and after merging (Figure 5).",
        "llava-sv analyze similarity --model-path checkpoints/tiny-skip --image-folder playground/data/toy/images",
    )
    args = parser.parse_args(argv)
    results = Results(args.output, "similarity", args.overwrite)
    job = open_job(args)
    table = collect(job)
    numbers = numbers_of(table, job)
    title = f"Similarity of visual tokens within a picture, {numbers['images']} pictures"
    results.save(arrays_of(table), numbers, lambda: draw(table, title))
    print(render(numbers["groups"]))
    return 0


def render(groups: dict[str, Any]) -> str:
    """A line a group for a terminal."""
    lines = [f"{'group':<26}{'tokens':>8}{'mean':>8}{'median':>8}{'5%':>8}{'95%':>8}   (cosine of pairs)"]
    for group, one in groups.items():
        pairs = one["pairs"]
        lines.append(
            f"{group:<26}{one['tokens_per_image']:>8.1f}"
            + "".join(f"{pairs[name]:>8.3f}" for name in ("mean", "q50", "q05", "q95"))
        )
    return "\n".join(lines)
