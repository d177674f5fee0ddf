"""Pictures of what `data.stats` measured, as PNG: task groups, sources, the shape of records, visual tokens, sequence
lengths with and without skipping. The report and its columns arrive, files leave. Called by `data_stats`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_sv.data.stats import NO_SOURCE, Columns
from llava_sv.errors import not_written
from llava_sv.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE, SKIPPING, FFN, TEXT, QUIET = "#1f77b4", "#2ca02c", "#d98c00", "#7f7f7f", "#c9d9e8"
BINS = 60
MOST_SOURCES = 50
"""Bars of sources.png; what is smaller goes into one bar."""
WIDE = 30
"""A length axis is logarithmic where the longest is so many times the shortest."""
SIDES = {"dense": ("dense", DENSE), "skipping": ("with skipping", SKIPPING)}


def draw(values: dict[str, Any], found: Columns, folder: Path) -> list[Path]:
    """Draw what there is into `folder`; returns the files. values: the report. Raises `UserError` where it cannot."""
    import matplotlib

    matplotlib.use("Agg")
    pictures = {"records.png": _records}
    if list(values["groups"]) != [NO_SOURCE]:
        pictures |= {"groups.png": _groups, "sources.png": _sources}
    if "visual" in values and values["images"]:
        pictures["visual_tokens.png"] = _visual_tokens
    if "sequence" in values:
        pictures["lengths.png"] = _lengths
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            figure = picture(values, found)
            with replacing(folder / name) as temporary:
                figure.savefig(temporary, dpi=120, format="png")
            matplotlib.pyplot.close(figure)
    except OSError as error:
        raise not_written(f"--plots {folder}:", error, "name another folder") from error
    return [folder / name for name in pictures]


def _figure(columns: int, width: float, height: float, **more: Any) -> tuple[Any, list[Axes]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False, **more)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def short(value: float, _position: Any = None) -> str:
    """`1234567` -> `1.2M`: for ticks and labels."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def edges_of(columns: list[np.ndarray], log: bool) -> np.ndarray:
    """Borders of bins that hold whole numbers, each as many as its neighbours, or as many times as many."""
    low = min(int(column.min()) for column in columns)
    high = max(int(column.max()) for column in columns)
    if log:
        edges = np.geomspace(max(low, 1) - 0.5, high + 0.5, BINS + 1)
        return np.unique(np.r_[low - 0.5, np.ceil(edges[1:-1]) - 0.5, high + 0.5])
    step = max(1, -(-(high - low + 1) // BINS))
    return np.arange(low, high + step + 1, step) - 0.5


def is_wide(columns: list[np.ndarray]) -> bool:
    """Whether a logarithmic axis shows these better."""
    low = min(float(np.quantile(column, 0.01)) for column in columns)
    return max(float(column.max()) for column in columns) > WIDE * max(low, 1)


def _histogram(axes: Axes, columns: dict[str, tuple[np.ndarray, str]], unit: str) -> None:
    """Records by length, {label: (values, colour)} over each other; the mean of each is marked and said."""
    arrays = [column for column, _ in columns.values()]
    log = is_wide(arrays)
    edges = edges_of(arrays, log)
    for label, (column, colour) in columns.items():
        counts, _ = np.histogram(column, edges)
        mean = float(column.mean())
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.45)
        axes.stairs(counts, edges, color=colour, lw=1)
        axes.axvline(mean, color=colour, lw=1.5, ls="--", label=f"{label}: mean {short(mean)}".removeprefix(": "))
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=max(edges[0], 0.5))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set_major_formatter(short)
    axes.set_xlabel(unit + (" (log scale)" if log else ""))
    axes.legend(frameon=False, fontsize=9)


def _records(values: dict[str, Any], found: Columns) -> Any:
    """records.png: images, exchanges and text of a record."""
    text = "text_tokens" if "text_tokens" in found.records else "characters"
    figure, axes = _figure(3, 13, 3.8)
    figure.suptitle(f"{Path(values['file']).name}: {values['records']:,} records")
    units = {"images": "images a record", "exchanges": "questions and answers a record"}
    units[text] = "text tokens a record" if text == "text_tokens" else "characters a record"
    for one, (name, unit) in zip(axes, units.items()):
        column = found.records[name]
        if int(column.max()) > 12:
            _histogram(one, {"": (column, DENSE)}, unit)
            continue
        least = 0 if name == "images" else min(1, int(column.min()))
        counts = np.bincount(column)[least:]
        places = range(least, least + len(counts))
        bars = one.bar(places, counts, color=QUIET, ec=DENSE)
        one.bar_label(bars, [f"{count / len(column):.1%}" if count else "" for count in counts], fontsize=8, padding=2)
        one.set_xticks(places)
        one.yaxis.set_major_formatter(short)
        one.set_xlabel(unit)
    axes[0].set_ylabel("records")
    return figure


def _bars(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """Records of each row, those with an image and those without, with number and share."""
    names = list(rows)
    with_image = [rows[name]["with_image"] for name in names]
    text = [rows[name]["records"] - rows[name]["with_image"] for name in names]
    axes.barh(names, with_image, color=DENSE, label="with an image")
    bars = axes.barh(names, text, left=with_image, color=TEXT, label="text only")
    labels = [f"{rows[name]['records']:,}  {rows[name]['share']:.1%}" for name in names]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.margins(y=0.02)
    axes.set_xlim(0, 1.22 * max(row["records"] for row in rows.values()))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(short)
    axes.set_xlabel("records")
    axes.legend(frameon=False, fontsize=9, loc="best")


def _groups(values: dict[str, Any], found: Columns) -> Any:
    """groups.png: records of each task group; where sequences are known, their tokens too."""
    groups = dict(sorted(values["groups"].items(), key=lambda item: -item[1]["records"]))
    with_tokens = "sequence" in values
    figure, axes = _figure(1 + with_tokens, 6.5 * (1 + with_tokens), 1.6 + 0.42 * len(groups), sharey=True)
    axes[0].set_title(f"{values['records']:,} records by task group")
    _bars(axes[0], groups)
    if with_tokens:
        _tokens_of_groups(axes[1], groups, skips="ffn" in values["visual"])
        axes[1].set_title(f"tokens by task group ({values['visual']['setting']})")
    return figure


def _tokens_of_groups(axes: Axes, groups: dict[str, dict[str, Any]], skips: bool) -> None:
    """What the tokens of each group are, and what skipping takes away."""
    parts: dict[str, tuple[str, str, str | None]] = {"text": (TEXT, "text_tokens", None)}
    if skips:
        parts["visual, through the FFN"] = (FFN, "visual_ffn", None)
        parts["visual, skipped (attention only)"] = (SKIPPING, "visual_skipping", "visual_ffn")
        parts["visual, dense only"] = (QUIET, "visual_dense", "visual_skipping")
    else:
        parts["visual"] = (DENSE, "visual_dense", None)
    left = np.zeros(len(groups))
    for label, (colour, name, less) in parts.items():
        width = np.array([row[name] - (row[less] if less else 0) for row in groups.values()])
        axes.barh(list(groups), width, left=left, color=colour, label=label)
        left = left + width
    axes.xaxis.set_major_formatter(short)
    axes.set_xlabel("tokens")
    axes.legend(frameon=False, fontsize=9, loc="best")


def _sources(values: dict[str, Any], found: Columns) -> Any:
    """sources.png: records of each source, the largest first."""
    rows = {name: row for group in values["groups"].values() for name, row in group["sources"].items()}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["records"]))
    shown = dict(list(rows.items())[:MOST_SOURCES])
    rest = list(rows.values())[MOST_SOURCES:]
    if rest:
        names = ("records", "with_image", "share")
        shown[f"{len(rest)} more"] = {name: sum(row[name] for row in rest) for name in names}
    figure, axes = _figure(1, 8, 1.4 + 0.24 * len(shown))
    axes[0].set_title(f"{values['records']:,} records by source")
    _bars(axes[0], shown)
    axes[0].tick_params(axis="y", labelsize=8)
    return figure


def _visual_tokens(values: dict[str, Any], found: Columns) -> Any:
    """visual_tokens.png: tokens of an image before and after, and those through the FFN."""
    labels = {name: what for name, what in SIDES.items() if name in values["visual"]}
    if "ffn" in values["visual"]:
        labels["ffn"] = ("of them through the FFN", FFN)
    title = f"visual tokens of an image ({values['visual']['setting']})"
    if any(len(np.unique(found.images[name])) > 1 for name in labels):
        figure, axes = _figure(1, 8, 4)
        _histogram(axes[0], {label: (found.images[name], colour) for name, (label, colour) in labels.items()}, "tokens")
        axes[0].set_ylabel("images")
    else:
        figure, axes = _figure(1, 8, 0.9 + 0.55 * len(labels))
        means = [values["visual"][name]["per_image"]["mean"] for name in labels]
        bars = axes[0].barh([label for label, _ in labels.values()], means, color=[c for _, c in labels.values()])
        axes[0].bar_label(bars, [f"{mean:,.0f}  ({mean / means[0]:.0%})" for mean in means], padding=4)
        axes[0].margins(x=0.18)
        axes[0].invert_yaxis()
        axes[0].set_xlabel("tokens")
    axes[0].set_title(title)
    return figure


def _lengths(values: dict[str, Any], found: Columns) -> Any:
    """lengths.png: tokens of a sequence before and after skipping."""
    sides = {label: (found.records[f"sequence_{name}"], colour) for name, (label, colour) in SIDES.items()}
    if "skipping" not in values["sequence"]:
        sides.pop("with skipping")
    figure, axes = _figure(1, 9, 4.4)
    _histogram(axes[0], sides, "tokens of a sequence: text and visual tokens")
    longest = values["batches"]["model_max_length"]
    if longest <= 1.5 * max(float(column.max()) for column, _ in sides.values()):
        names = [name for name in SIDES if name in values["batches"]]
        cut = ", ".join(f"{values['batches'][name]['sequences_cut']:,} {name}" for name in names)
        axes[0].axvline(longest, color="black", lw=1.2, label=f"--model_max_length {longest:,} (cut: {cut})")
        axes[0].legend(fontsize=9, framealpha=1, edgecolor="none")  # the line passes behind it
    axes[0].set_ylabel("records")
    axes[0].set_title(f"{Path(values['file']).name}: sequence lengths ({values['visual']['setting']})")
    return figure
