"""Rows of a sweep in; a Markdown table with break-even points, and a picture, out. Called by `bench sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sv.bench import break_even
from llava_sv.bench.cells import markdown, percent
from llava_sv.bench.table import environments, size_of
from llava_sv.errors import not_written
from llava_sv.files import replacing

HEAD = ["size", "batch", "text", "visual", "what", "new tokens", "dense ms", "skip ms", "time saved", "FLOPs saved"]
HEAD += ["time / FLOPs"]
AXES = {"new_tokens": "new tokens", "text_tokens": "text tokens", "batch": "samples a batch", "visual": "visual tokens"}
"""What may vary, in the order in which a curve's axis is chosen."""

KINDS = {
    "training step": "#1f77b4",
    "prefill": "#2ca02c",
    "decode": "#d62728",
    "answer": "#9467bd",
}
"""What a point is of, and its colour."""

CURVES = {"training step": "A training step", "answer": "An answer, end to end"}
MARKERS = {"llava": "o", "llava_hd": "s", "cos": "^"}
MOST_SIZES = 4
"""Sizes, and slices of them, that a picture's title names."""

MOST_NAMED = 8
"""Curves of a panel that get a line of the legend each."""


def points_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's figures one by one: `kind`, `dense_ms`, `skip_ms`, `time_saved`, `flops_saved`, and its settings."""
    report, asked = row["report"], row["settings"]
    common = {
        **{name: asked[name] for name in ("family", "batch", "text_tokens", "layers")},
        "size": size_of(report),
        "visual": asked["num_retained"] + asked["num_skipped"],
        "budget": f"{asked['num_retained']} + {asked['num_skipped']}",
        "new_tokens": None,
    }
    if row["what"] == "train":
        region = report["regions"]["model"]
        times = {"dense_ms": region["dense"]["step_ms"], "skip_ms": region["skip"]["step_ms"]}
        return [{**common, "kind": "training step", **times, **_shares(region)}]
    points = []
    for name, key in (("prefill", "prefill_ms"), ("decode", "decode_ms_per_token")):
        times = {"dense_ms": report["dense"][key], "skip_ms": report["skip"][key]}
        points.append({**common, "kind": name, **times, **_shares(report["regions"][name])})
    for length in report["lengths"]:
        times = {name: length[name] for name in ("dense_ms", "skip_ms", "new_tokens")}
        points.append({**common, "kind": "answer", **times, **_shares(length)})
    return points


def _shares(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("time_saved", "flops_saved", "time_saved_per_flops_saved")}


def curves_of(points: list[dict[str, Any]], kind: str, axis: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Points of a kind that differ in `axis` alone, in its order: (size, the other axes' values) -> points."""
    others = [name for name in ("batch", "text_tokens", "budget", "new_tokens") if name != axis]
    others = [name for name in others if not (axis == "visual" and name == "budget")]
    curves: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in points:
        if point["kind"] == kind:
            curves.setdefault((point["size"], *((name, point[name]) for name in others)), []).append(point)
    return {key: sorted(curve, key=lambda point: point[axis]) for key, curve in curves.items()}


def varied(points: list[dict[str, Any]], kind: str) -> list[str]:
    """The axes along which some points of this kind differ."""
    own = [point for point in points if point["kind"] == kind]
    return [axis for axis in AXES if len({point[axis] for point in own}) > 1]


def break_evens(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every curve of two points and more, where skipping is the faster one: `of_curve`'s, with what it is of."""
    found = []
    for kind in CURVES:
        for axis in varied(points, kind):
            for key, curve in curves_of(points, kind, axis).items():
                if len({point[axis] for point in curve}) > 1:
                    crossing = break_even.of_curve([(point[axis], point["time_saved"]) for point in curve])
                    others = {name: value for name, value in key[1:] if value is not None}
                    found.append({"kind": kind, "size": key[0], "axis": axis, "others": others, **crossing})
    return found


def render(rows: list[dict[str, Any]]) -> str:
    """The table, the break-even points below it, and on what it was measured."""
    points = [point for row in rows for point in points_of(row)]
    cells = [
        [
            point["size"],
            str(point["batch"]),
            str(point["text_tokens"]),
            point["budget"],
            point["kind"],
            str(point["new_tokens"] or "-"),
            f"{point['dense_ms']:.2f}",
            f"{point['skip_ms']:.2f}",
            *(percent(point[name]) for name in ("time_saved", "flops_saved", "time_saved_per_flops_saved")),
        ]
        for point in points
    ]
    notes = []
    for found in break_evens(points):
        others = ", ".join(f"{AXES.get(name, name)} {value}" for name, value in found["others"].items())
        words = break_even.in_words(found, AXES[found["axis"]])
        notes.append(f"- {found['size']}, {found['kind']} ({others}): skipping is faster {words}.")
    return "\n".join([markdown(HEAD, cells), "", *notes, *([""] if notes else []), *environments(rows)])


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Time saved against FLOPs saved, and along what was varied, as a PNG. Raises `UserError` where it cannot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [point for row in rows for point in points_of(row)]
    panels = [(kind, varied(points, kind)[0]) for kind in CURVES if varied(points, kind)]
    figure, axes = pyplot.subplots(
        1, 1 + len(panels), figsize=(5.4 * (1 + len(panels)), 5.2), layout="constrained", squeeze=False
    )
    _scatter(axes[0][0], points)
    for (kind, axis), one in zip(panels, axes[0][1:]):
        _curves(one, points, kind, axis)
    sizes = list(dict.fromkeys(point["size"] for point in points))
    figure.suptitle("; ".join(sizes[:MOST_SIZES]) + ("; ..." if len(sizes) > MOST_SIZES else ""), fontsize=9)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    try:
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    except OSError as error:
        raise not_written(f"--png {path}:", error, "name another file") from error
    finally:
        pyplot.close(figure)


def _legend(axes: Any) -> None:
    """Below the panel, where no point can lie."""
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2)


def _scatter(axes: Any, points: list[dict[str, Any]]) -> None:
    for kind, colour in KINDS.items():
        for family, marker in MARKERS.items():
            own = [point for point in points if (point["kind"], point["family"]) == (kind, family)]
            if own:
                x, y = ([100 * point[name] for point in own] for name in ("flops_saved", "time_saved"))
                label = kind if len({point["family"] for point in points}) == 1 else f"{kind}, {family}"
                axes.scatter(x, y, color=colour, marker=marker, s=36, alpha=0.8, label=label, linewidths=0)
    most = max([100 * point["flops_saved"] for point in points] + [1.0])
    axes.plot([0, most], [0, most], color="0.4", linewidth=1, linestyle="--", label="all of it becomes time")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set(title="Time saved against FLOPs saved", xlabel="FLOPs saved, %", ylabel="time saved, %")
    _legend(axes)


def _curves(axes: Any, points: list[dict[str, Any]], kind: str, axis: str) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import ScalarFormatter

    curves = {key: curve for key, curve in curves_of(points, kind, axis).items() if len(curve) > 1}
    changing = {
        name for key in curves for name, _ in key[1:] if len({dict(k[1:])[name] for k in curves if k[0] == key[0]}) > 1
    }
    for index, (key, curve) in enumerate(curves.items()):
        named = [f"{AXES.get(name, name)} {value}" for name, value in key[1:] if name in changing]
        label = ", ".join([key[0], *named]) if len(curves) <= MOST_NAMED else None
        x, y = [point[axis] for point in curve], [100 * point["time_saved"] for point in curve]
        colour = colormaps["viridis"](index / max(len(curves), 2) * 0.9)
        axes.plot(x, y, marker=MARKERS[curve[0]["family"]], color=colour, markersize=4.5, linewidth=1.4, label=label)
    axes.axhline(0, color="0.4", linewidth=0.8)
    ticks = sorted({point[axis] for curve in curves.values() for point in curve})
    if ticks and ticks[-1] >= 8 * ticks[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set(title=CURVES[kind], xlabel=AXES[axis], ylabel="time saved, %  (below 0: dense is faster)")
    if 0 < len(curves) <= MOST_NAMED:
        _legend(axes)
