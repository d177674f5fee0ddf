"""`llava-sv analyze layer-plan`: which layers may skip for a given error budget (section 5's layer-wise strategy),
measured on pictures, written as `skip_layers`.

A search builds a path, one more layer at each step; each step's joint error is measured, never added up from single
ones. The plan is the longest stretch of the path within the budget. L layers, n pictures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_sv.analysis.common import Job, Results, make_parser
from llava_sv.analysis.joint_error import MEASURES, LayerSet, outcomes
from llava_sv.analysis.plots import COLOURS, figure, whole_numbers
from llava_sv.analysis.trajectory import add_budget_flags, open_skipping, parse_layers, walk_of
from llava_sv.bench.checkpoint import llm_of
from llava_sv.bench.exact import Tokens, llm_flops
from llava_sv.errors import UserError, not_written
from llava_sv.files import check_can_write, read_json, write_json
from llava_sv.model.token_groups import TokenRole

SEARCHES = ("ranked", "greedy")
EXAMPLE = (
    "llava-sv analyze layer-plan --budget 0.1 --model-path checkpoints/tiny-skip "
    "--image-folder playground/data/toy/images"
)

Evaluate = Callable[[Sequence[LayerSet], str], np.ndarray]
"""Sets of layers, and what progress is called -> measured values [n, len(sets)]."""


def make_arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser("layer-plan", __doc__ or "", EXAMPLE)
    add_budget_flags(parser)
    parser.add_argument("--budget", type=float, required=True, help="the most that skipping may do, mean of pictures")
    parser.add_argument(
        "--measure", default="error", choices=MEASURES, help="error: of the final hidden states of tokens that are not "
        "skipped, by their length (0.1 is 10%%); kl: of the next token, in nats (default error)",
    )  # fmt: skip
    parser.add_argument(
        "--search", default="ranked", choices=SEARCHES, help="ranked: layers in order of what each does alone, about "
        "L walks a picture; greedy: all that are left tried at each step, about L^2 / 2 (default ranked)",
    )  # fmt: skip
    parser.add_argument("--candidates", default="all", help="layers that may skip: all, 8-31 or 0,4,8-15 (default all)")
    parser.add_argument(
        "--write-config", metavar="DIR", help="put a copy of the checkpoint's config.json there, with skip_layers set"
    )
    return parser


@dataclass(frozen=True)
class Step:
    """One step of a path: `layer` joined, and what the layers so far do together, [n]."""

    layer: int
    values: np.ndarray

    @property
    def mean(self) -> float:
        """Over pictures."""
        return float(self.values.mean())


def ranked_path(evaluate: Evaluate, candidates: Sequence[int], alone: np.ndarray) -> list[Step]:
    """Layers in order of their mean `alone` [n, len(candidates)]; ties go to the later layer, which fewer follow."""
    order = sorted(range(len(candidates)), key=lambda i: (alone[:, i].mean(), -candidates[i]))
    layers = [candidates[i] for i in order]
    values = evaluate([frozenset(layers[: count + 1]) for count in range(len(layers))], "together")
    return [Step(layer, values[:, index]) for index, layer in enumerate(layers)]


def greedy_path(evaluate: Evaluate, candidates: Sequence[int], alone: np.ndarray) -> list[Step]:
    """At each step the layer that does least together with those already chosen."""
    chosen: list[Step] = []
    left = list(candidates)
    while left:
        base = frozenset(step.layer for step in chosen)
        values = alone if not chosen else evaluate([base | {layer} for layer in left], f"{len(base) + 1} layers")
        best = min(range(len(left)), key=lambda i: (values[:, i].mean(), -left[i]))
        chosen.append(Step(left.pop(best), values[:, best]))
    return chosen


def within(path: list[Step], budget: float) -> list[Step]:
    """The longest stretch from the path's beginning whose joint mean is within the budget."""
    lengths = [count for count in range(1, len(path) + 1) if path[count - 1].mean <= budget]
    return path[: max(lengths, default=0)]


def as_setting(layers: Sequence[int], num_layers: int) -> str | list[int]:
    """Layers as `skip_layers` takes them: `all`, `"2,8-15"`, or [] for none."""
    ordered = sorted(layers)
    if len(ordered) == num_layers:
        return "all"
    runs: list[list[int]] = []
    for layer in ordered:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or []


def mean_tokens(counts: list[Tokens]) -> Tokens:
    """Of the pictures, to whole tokens."""
    fields = ("text", "retained", "skipped", "summaries")
    return Tokens(**{name: round(sum(getattr(one, name) for one in counts) / len(counts)) for name in fields})


def tokens_of(roles: Any) -> Tokens:
    """Counts of one sequence by role."""
    count = {role: int((roles == int(role)).sum()) for role in TokenRole}
    retained = count[TokenRole.RETAINED] + count[TokenRole.FINE]
    return Tokens(count[TokenRole.TEXT], retained, count[TokenRole.SKIPPED], count[TokenRole.SUMMARY])


def flops_saved(config: Any, tokens: Tokens, skipping_layers: int) -> float:
    """Share of the decoder's FLOPs of a prompt that so many skipping layers save, against none on the same tokens."""
    with_none, with_some = (sum(llm_flops(llm_of(config), tokens, 1, count).values()) for count in (0, skipping_layers))
    return 1 - with_some / with_none


class Pictures:
    """Every measurement of one job: a pass over the pictures for many sets at once."""

    def __init__(self, job: Job, measure: str):
        self.job, self.measure = job, measure
        self.names: list[str] = []
        self.tokens: list[Tokens] = []
        self.without: list[str] = []

    def __call__(self, sets: Sequence[LayerSet], what: str) -> np.ndarray:
        """[n, len(sets)]; see `Evaluate`. Pictures in which nothing is skipped do not count."""
        first, rows = not self.names, []
        for sample in self.job.samples(what):
            walk = walk_of(self.job, sample)
            if not bool(walk.skipped.any()):
                if first:
                    self.without.append(sample.name)
                continue
            if first:
                self.names.append(sample.name)
                self.tokens.append(tokens_of(walk.roles))
            rows.append([getattr(outcome, self.measure) for outcome in outcomes(walk, sets)])
        if not rows:
            raise UserError(f"--image-folder {self.job.folder}: in none of these pictures is a token skipped")
        return np.array(rows)


def check_arguments(args: argparse.Namespace) -> None:
    """`UserError` for a budget without sense, and a folder that `--write-config` must not or cannot write."""
    if not (args.budget >= 0 and math.isfinite(args.budget)):
        raise UserError(f"--budget {args.budget}: must be a number of 0 or more")
    if args.write_config is None:
        return
    source, target = Path(args.model_path), Path(args.write_config)
    if not (source / "config.json").is_file():
        raise UserError(f"--write-config {target}: --model-path {source} is no folder with a config.json to copy")
    if target.resolve() == source.resolve():
        raise UserError(f"--write-config {target}: is the checkpoint itself, which stays as it is; name another folder")
    path = target / "config.json"
    if path.exists() and not args.overwrite:
        raise UserError(f"--write-config {target}: {path} exists; name another folder, or --overwrite")
    check_can_write("--write-config", path)


def write_config(args: argparse.Namespace, job: Job, setting: str | list[int]) -> None:
    """The checkpoint's config.json with these `skip_layers`, into another folder."""
    values = read_json(Path(args.model_path, "config.json"), "llava-sv train")
    values["skip_vision"] = replace(job.model.config.skip_vision, skip_ffn=True, skip_layers=setting).to_dict()
    path = Path(args.write_config, "config.json")
    try:
        write_json(path, values)
    except OSError as error:
        raise not_written(f"--write-config {args.write_config}:", error, "name another folder") from error
    print(f"wrote {path}: put it into a copy of the checkpoint's folder")


def report(job: Job, pictures: Pictures, path: list[Step], args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON holds of the path and the plan."""
    config, tokens = job.model.config, mean_tokens(pictures.tokens)
    plan = within(path, args.budget)
    layers = sorted(step.layer for step in plan)
    setting = as_setting(layers, config.num_hidden_layers)
    return {
        **job.facts(),
        "pictures": pictures.names,
        "nothing_skipped_in": pictures.without,
        "measure": args.measure,
        "budget": args.budget,
        "search": args.search,
        "skip_layers": setting,
        "layers_that_skip": layers,
        "measured_mean": plan[-1].mean if plan else 0.0,
        "measured_worst": float(plan[-1].values.max()) if plan else 0.0,
        "flops_saved": flops_saved(config, tokens, len(plan)),
        "flops_saved_by_all": flops_saved(config, tokens, config.num_hidden_layers),
        "tokens": {name: getattr(tokens, name) for name in ("text", "retained", "skipped", "summaries")},
        "path": [
            {
                "added": step.layer,
                "measured_mean": step.mean,
                "measured_worst": float(step.values.max()),
                "flops_saved": flops_saved(config, tokens, count + 1),
            }
            for count, step in enumerate(path)
        ],
    }


def sentences(numbers: dict[str, Any], alone: dict[int, float]) -> list[str]:
    """The plan in words."""
    unit = "nats of KL" if numbers["measure"] == "kl" else "of the hidden states' length"
    if not numbers["layers_that_skip"]:
        layer = min(alone, key=lambda one: alone[one])
        return [
            f"No layer fits a budget of {numbers['budget']:g} {unit}: the least that one layer does is "
            f"{alone[layer]:.4g} (layer {layer})."
        ]
    return [
        f"skip_layers: {json.dumps(numbers['skip_layers'])}  ({len(numbers['layers_that_skip'])} of "
        f"{numbers['layers']} layers; to train with it: --sv_skip_layers {numbers['skip_layers']})",
        f"measured on {len(numbers['pictures'])} pictures: {numbers['measured_mean']:.4g} {unit} on average, "
        f"{numbers['measured_worst']:.4g} at worst; budget {numbers['budget']:g}",
        f"saves {numbers['flops_saved']:.1%} of the decoder's FLOPs for a prompt; all layers would save "
        f"{numbers['flops_saved_by_all']:.1%}",
    ]


def draw(numbers: dict[str, Any], candidates: list[int], alone: np.ndarray) -> Any:
    """Left: each layer alone; right: the path, with what it saves, and the budget."""
    made, axes = figure(columns=2, width=11.0, height=4.2)
    unit = "KL, nats" if numbers["measure"] == "kl" else "relative error"
    chosen = set(numbers["layers_that_skip"])
    colours = [COLOURS["skip"] if layer in chosen else COLOURS["skipped"] for layer in candidates]
    left, right = axes[0]
    left.bar(candidates, alone.mean(0), color=colours)
    left.set(title="One layer skips alone (green: in the plan)", xlabel="layer", ylabel=unit)
    counts = np.arange(len(numbers["path"]) + 1)
    means = [0.0, *(step["measured_mean"] for step in numbers["path"])]
    worst = [0.0, *(step["measured_worst"] for step in numbers["path"])]
    right.plot(counts, means, marker="o", color=COLOURS["skip"], label="together, mean of pictures")
    right.plot(counts, worst, ":", marker=".", color=COLOURS["other"], label="together, worst picture")
    right.axhline(numbers["budget"], color=COLOURS["bound"], linewidth=1.0, label="budget")
    right.axvline(len(chosen), color=COLOURS["text"], linewidth=0.8, linestyle="--")
    right.set(title="The path of the search", xlabel="layers that skip", ylabel=unit)
    if len(counts) <= 16:
        for count, mean, step in zip(counts[1:], means[1:], numbers["path"]):
            right.annotate(f"+{step['added']}", (count, mean), (0, 7), textcoords="offset points", ha="center", size=8)
    whole_numbers(left)
    whole_numbers(right)
    per_layer = 100 * numbers["path"][-1]["flops_saved"] / len(numbers["path"])
    top = right.secondary_xaxis(-0.2, functions=(lambda n: n * per_layer, lambda share: share / per_layer))
    top.set_xlabel("decoder's FLOPs saved, percent")
    right.legend(fontsize=8, frameon=False, loc="upper left")
    return made


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the files, return what the JSON holds."""
    check_arguments(args)
    results = Results(args.output, "layer-plan", args.overwrite)
    job = open_skipping(args)
    candidates = parse_layers("--candidates", args.candidates, job.model.config.num_hidden_layers)
    pictures = Pictures(job, args.measure)
    alone = pictures([frozenset({layer}) for layer in candidates], "each layer alone")
    search = greedy_path if args.search == "greedy" else ranked_path
    path = search(pictures, candidates, alone)
    numbers = report(job, pictures, path, args)
    by_layer = dict(zip(candidates, alone.mean(0).tolist()))
    numbers |= {"alone": by_layer, "statement": sentences(numbers, by_layer)}
    arrays = {
        "pictures": np.array(pictures.names),
        "candidates": np.array(candidates),
        "alone": alone,
        "added": np.array([step.layer for step in path]),
        "together": np.stack([step.values for step in path], axis=1),
    }
    results.save(arrays, numbers, lambda: draw(numbers, candidates, alone))
    if args.write_config is not None:
        write_config(args, job, numbers["skip_layers"])
    return numbers


def main(argv: list[str]) -> int:
    """Entry of the command."""
    print("\n".join(run(make_arguments().parse_args(argv))["statement"]))
    return 0
