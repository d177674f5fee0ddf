"""`llava-sv analyze tradeoff --reports`: the trade-off of models that were trained, from reports that exist already.

Reports of the quickstart, the families, an ablation or `analyze tradeoff` itself arrive; accuracy against every cost
that they tell leaves. Nothing is measured here. `READERS` is the list of what can be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_sv.analysis.common import Results
from llava_sv.analysis.plots import figure
from llava_sv.data.toy_questions import FINE_DETAIL
from llava_sv.errors import UserError
from llava_sv.files import read_json

COSTS: dict[str, tuple[str, float]] = {
    "prefill_flops": ("FLOPs of a prefill, GFLOPs", 1e-9),
    "flops_ratio": ("FLOPs of a prefill, % of the same family dense", 100.0),
    "train_seconds": ("training, minutes", 1 / 60),
    "time_to_first_token_ms": ("time to first token, ms", 1.0),
    "decode_ms_per_token": ("each further token, ms", 1.0),
    "kv_bytes": ("KV cache while decoding, KiB", 1 / 1024),
    "visual_tokens": ("visual tokens of an image", 1.0),
}
"""Cost -> (name and unit in the figure, factor to that unit)."""

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#d62728")


LEAST_SPAN = 20
"""Points of accuracy that the figure spans at least, so that small differences look small."""


@dataclass(frozen=True)
class Point:
    """One model, or one budget of one."""

    name: str
    accuracy: float
    fine_detail: float | None = None
    costs: dict[str, float] = field(default_factory=dict)
    """What the report tells of `COSTS`, in plain units: FLOPs, shares, seconds, milliseconds, bytes, tokens."""


def _point(name: str, accuracy: float, fine: float | None, **costs: float | None) -> Point:
    return Point(name, accuracy, fine, {key: value for key, value in costs.items() if value is not None})


def of_quickstart(report: dict[str, Any]) -> list[Point]:
    """`report.json` of the quickstart: dense and skip."""
    points = []
    for name in ("dense", "skip"):
        model, tokens = report[name], report["visual_tokens"]
        timing = model["timing"]
        points.append(_point(
            name,
            model["accuracy"],
            model["per_category"].get(FINE_DETAIL),
            flops_ratio=1.0 if name == "dense" else report["exact_flops_ratio"],
            train_seconds=model["train_seconds"],
            time_to_first_token_ms=timing["time_to_first_token_ms"],
            decode_ms_per_token=timing["decode_ms_per_token"],
            kv_bytes=timing["kv_bytes"],
            visual_tokens=tokens["dense"] if name == "dense" else tokens["retained"] + tokens["skipped"]
            + tokens["summaries"],
        ))  # fmt: skip
    return points


def of_families(report: dict[str, Any]) -> list[Point]:
    """`report.json` of the families: each model."""
    return [
        _point(
            name,
            model["accuracy"],
            model["per_category"].get(FINE_DETAIL),
            prefill_flops=model.get("prefill_flops"),
            flops_ratio=model.get("exact_ratio") if model["skipping"] else 1.0,
            train_seconds=model["train_seconds"],
            visual_tokens=model["visual_tokens"]["total"],
        )
        for name, model in report["models"].items()
    ]


def of_ablation(report: dict[str, Any]) -> list[Point]:
    """ablation.json: each row, means over seeds."""
    points = []
    for row in report["rows"]:
        fine, tokens = row["per_category"].get(FINE_DETAIL), row["visual_tokens"]
        points.append(_point(
            row["row"],
            row["accuracy"]["mean"],
            fine and fine["mean"],
            train_seconds=row["train_seconds"],
            kv_bytes=row["kv_bytes"],
            visual_tokens=tokens["retained"] + tokens["skipped"] + tokens["summaries"],
        ))  # fmt: skip
    return points


def of_tradeoff(report: dict[str, Any]) -> list[Point]:
    """tradeoff.json of one checkpoint: each budget."""
    return [
        _point(
            row["budget"],
            row["accuracy"],
            row["groups"].get(FINE_DETAIL, {}).get("accuracy"),
            **{key: row[key] for key in ("prefill_flops", "flops_ratio", "kv_bytes", "visual_tokens")},
        )
        for row in report["rows"]
    ]


READERS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], list[Point]]]] = {
    "the quickstart's report.json": (("dense", "skip", "exact_flops_ratio", "visual_tokens"), of_quickstart),
    "the families' report.json": (("models", FINE_DETAIL), of_families),
    "ablation.json": (("rows", "paper_overall"), of_ablation),
    "tradeoff.json": (("rows", "trained_with"), of_tradeoff),
}
"""Kind -> (fields that tell it, how it is read)."""


def read(path: Path) -> tuple[list[Point], Any]:
    """The points of one report, and what it says of its questions: number and chance.

    Raises `UserError` for a file that is none of `READERS`, or lacks a field of its kind.
    """
    values = read_json(path, "the command that reports")
    for kind, (telling, reader) in READERS.items():
        if isinstance(values, dict) and all(name in values for name in telling):
            try:
                return reader(values), {"questions": values.get("questions"), "chance": chance_of(values)}
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"--reports {path}: {kind} without what is needed ({error}); make it anew") from error
    raise UserError(f"--reports {path}: not a report that this knows; it reads {', '.join(READERS)}")


def chance_of(report: dict[str, Any]) -> float | None:
    """What guessing gets of the report's questions."""
    chance = report.get("chance")
    return chance.get("accuracy") if isinstance(chance, dict) else chance


def label_of(path: Path, paths: list[Path]) -> str:
    """A report's name in the figure: its folder's, and the file's where two would be called alike, or else its path."""
    names = [f"{other.resolve().parent.name}/{other.stem}" for other in paths]
    parents = [name.partition("/")[0] for name in names]
    name, parent = names[paths.index(path)], parents[paths.index(path)]
    return parent if parents.count(parent) == 1 else name if names.count(name) == 1 else str(path)


def drawn_costs(reports: dict[str, list[Point]]) -> list[str]:
    """Costs that at least two points tell and that differ."""
    points = [point for found in reports.values() for point in found]
    values = {name: {p.costs[name] for p in points if name in p.costs} for name in COSTS}
    return [name for name, found in values.items() if len(found) > 1]


def draw(reports: dict[str, list[Point]], costs: list[str]) -> Any:
    """One panel a cost; one colour a report; hollow marks: fine detail alone."""
    columns = min(len(costs), 3)
    rows = -(-len(costs) // columns)
    made, axes = figure(columns=columns, rows=rows, width=max(4.4 * columns, 6.0), height=3.6 * rows + 0.8, sharey=True)
    for axis in axes.flat[len(costs) :]:
        axis.set_axis_off()
    names: list[tuple[Any, float, float, str]] = []
    for axis, cost in zip(axes.flat, costs):
        words, factor = COSTS[cost]
        for index, (report, points) in enumerate(reports.items()):
            shown = sorted((p for p in points if cost in p.costs), key=lambda point: point.costs[cost])
            if shown:
                names += _draw_points(axis, shown, cost, factor, COLOURS[index % len(COLOURS)], report)
        axis.set_xlabel(words)
        axis.grid(axis="y", alpha=0.3)
        axis.margins(x=0.18, y=0.15)
        axis.set_xlim(0, 1.15 * max(axis.dataLim.x1, 1e-12))
    low, high = axes[0][0].get_ylim()
    apart = max(0.0, LEAST_SPAN - (high - low)) / 2
    axes[0][0].set_ylim(low - apart, high + apart)
    for row in axes:
        row[0].set_ylabel("accuracy, %")
    found = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    made.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 4), frameon=False)
    _write_names(made, names)
    return made


def _draw_points(
    axis: Any, points: list[Point], cost: str, factor: float, colour: str, report: str
) -> list[tuple[Any, float, float, str]]:
    """Marks; returns where names belong: (axis, x, y, name)."""
    x = [point.costs[cost] * factor for point in points]
    y = [100 * point.accuracy for point in points]
    axis.plot(x, y, "o", color=colour, label=report)
    fine = [(place, 100 * point.fine_detail) for place, point in zip(x, points) if point.fine_detail is not None]
    if fine:
        axis.plot(*zip(*fine), "o", color=colour, fillstyle="none", label=f"{report}: fine detail")
    return [(axis, place, height, point.name) for place, height, point in zip(x, y, points)]


PLACES = (
    (0, 5),
    (0, -14),
    (6, -4),
    (-6, -4),
    (6, 5),
    (-6, 5),
    (6, -14),
    (-6, -14),
    (0, 16),
    (0, -25),
    (0, 27),
    (0, -36),
)
"""Offsets of a name from its mark, in points, the best first."""


MARK_RADIUS = 3.0
"""Pixels that a name stays away from the middle of a mark."""


def _write_names(made: Any, names: list[tuple[Any, float, float, str]]) -> None:
    """Each name at the first of `PLACES` where it covers no other name and no mark."""
    made.draw_without_rendering()  # the layout must stand before extents are known
    renderer = made.canvas.get_renderer()
    taken: dict[Any, list[Any]] = {}
    marks: dict[Any, list[Any]] = {}
    for axis, x, y, _ in names:
        marks.setdefault(axis, []).append(axis.transData.transform((x, y)))
    for axis, x, y, name in names:
        for dx, dy in PLACES:
            text = axis.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=7,
                                 ha={0: "center", 6: "left", -6: "right"}[dx], va="bottom")  # fmt: skip
            box = text.get_window_extent(renderer)
            free = not any(box.overlaps(other) for other in taken.get(axis, []))
            wide = box.padded(MARK_RADIUS)
            if free and not any(wide.contains(*mark) for mark in marks[axis]):
                break
            if (dx, dy) != PLACES[-1]:
                text.remove()
        taken.setdefault(axis, []).append(box)


def run(args: argparse.Namespace) -> int:
    """Read, draw and write; a line a point for a terminal."""
    paths = [Path(name) for name in args.reports]
    results = Results(args.output, "tradeoff", args.overwrite)
    if any(path.resolve() == results.paths["json"].resolve() for path in paths):
        raise UserError(f"--output {args.output}: would replace a report that is read; name another folder")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("--reports: one file is there twice; drop one")
    found = {label_of(path, paths): read(path) for path in paths}
    reports, asked = {label: points for label, (points, _) in found.items()}, [about for _, about in found.values()]
    if any(about != asked[0] for about in asked):
        print("note: the reports are of different questions; accuracies compare within a report only", file=sys.stderr)
    costs = drawn_costs(reports)
    if not costs:
        raise UserError("--reports: no cost that two of their models tell and that differs; add a report")
    points = [(report, point) for report, told in reports.items() for point in told]
    arrays = {
        "report": np.array([report for report, _ in points]),
        "name": np.array([point.name for _, point in points]),
        "accuracy": np.array([point.accuracy for _, point in points]),
        "fine_detail": np.array([np.nan if p.fine_detail is None else p.fine_detail for _, p in points]),
        **{cost: np.array([point.costs.get(cost, np.nan) for _, point in points]) for cost in COSTS},
    }
    numbers = {
        "reports": {label: {"file": str(path), **about, "points": [vars(point) for point in reports[label]]}
                    for path, (label, (_, about)) in zip(paths, found.items())},
    }  # fmt: skip
    results.save(arrays, numbers, lambda: draw(reports, costs))
    for report, point in points:
        told = ", ".join(f"{COSTS[c][0]} {point.costs[c] * COSTS[c][1]:,.3g}" for c in costs if c in point.costs)
        print(f"{report} {point.name}: {point.accuracy:.1%}; {told}")
    return 0
