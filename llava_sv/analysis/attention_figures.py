"""The pictures of `analyze attention`: shares by layer and by generated token, and heat maps over pictures.

A `Tally` or the pictures' canvases come in, matplotlib figures go out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_sv.analysis.attention_places import Canvas, Picture
from llava_sv.analysis.attention_tally import Tally
from llava_sv.analysis.plots import COLOURS, figure

COLOUR_OF = {**COLOURS, "generated": COLOURS["other"]}
NAMES = {"generated": "the answer so far"}
CELL_INCHES = 1.75
"""Side of one map."""
MOST_LETTERS = 34
"""Of a name or an answer over a map."""


def draw_shares(tally: Tally, level: str) -> Any:
    """Three panels: share by layer, attention of one token by layer, share by generated token."""
    made, axes = figure(columns=3, width=12.5, height=4.6)
    by_layer, one_token, by_token = axes[0]
    groups = tally.groups
    share = tally.share()
    layers = np.arange(len(share))
    _stack(by_layer, layers, share, groups)
    by_layer.plot(layers, tally.first_token(), "k.", ms=5, label="first token of the sequence alone")
    by_layer.set(xlabel="layer", ylabel="share of attention", title="by layer", ylim=(0, 1))
    _whole_ticks(by_layer, len(layers), 0)

    over = tally.over_even()
    for i, name in enumerate(groups):
        one_token.plot(layers, over[:, i], "o-", ms=3.5, color=COLOUR_OF[name])
    one_token.axhline(1.0, color="black", lw=0.8, ls=":")
    one_token.set(xlabel="layer", ylabel="times an even share", title="one token of the group", yscale="log")
    _plain_log_ticks(one_token)
    _whole_ticks(one_token, len(layers), 0)

    series = tally.by_token().mean(axis=1)
    _stack(by_token, np.arange(1, len(series) + 1), series, groups)
    by_token.set(xlabel="generated token", ylabel="share, mean of layers", title="along the answer", ylim=(0, 1))
    _whole_ticks(by_token, len(series), 1)

    handles, labels = by_layer.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    dropped = "" if level == "none" else f"; KV level {level}: gone from the cache after the first token"
    made.suptitle(f"Attention of generated tokens, {len(tally.names)} pictures{dropped}", fontsize=11)
    return made


def _stack(axes: Any, places: np.ndarray, shares: np.ndarray, groups: list[str]) -> None:
    """Bars of all groups on top of each other, in the order of the sequence."""
    below = np.zeros(len(shares))
    for i, name in enumerate(groups):
        axes.bar(
            places, shares[:, i], bottom=below, width=0.92, color=COLOUR_OF[name], label=NAMES.get(name, name), lw=0
        )
        below = below + shares[:, i]
    axes.margins(x=0.01)


def _whole_ticks(axes: Any, count: int, first: int) -> None:
    """Whole numbers, at most about nine of them."""
    step = max(1, -(-count // 9))
    axes.set_xticks(range(first, first + count, step))


def _plain_log_ticks(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_maps(pictures: list[Picture], layers: list[int], token: int | None = None) -> Any:
    """A sheet: a row for each grid of each picture; the picture, the mean of all layers, then the layers chosen.

    token: the generated token whose maps they are, None for the mean of all.
    """
    rows = [(picture, canvas) for picture in pictures for canvas in picture.canvases]
    columns = 2 + len(layers)
    width, height = CELL_INCHES * columns + 0.3, (CELL_INCHES + 0.4) * len(rows) + 0.35
    made, axes = figure(columns=columns, rows=len(rows), width=width, height=height)
    for row, (picture, canvas) in enumerate(rows):
        _picture(axes[row, 0], picture, canvas)
        maps = [("all layers", canvas.mass.mean(axis=0)), *((f"layer {i}", canvas.mass[i]) for i in layers)]
        for cell, (name, mass) in zip(axes[row, 1:], maps):
            _heat(cell, canvas, mass)
            cell.set_title(f"{name}: {100 * mass.sum():.1f}%", fontsize=8)
        for cell in axes[row]:
            cell.set_axis_off()
    whose = "the answer's tokens" if token is None else f"generated token {token}"
    made.suptitle(
        f"Attention of {whose} on patches: bright is each map's own maximum, percent is of all attention", fontsize=8.5
    )
    return made


def _picture(axes: Any, picture: Picture, canvas: Canvas) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(canvas.pixels)
    grid = "" if canvas.name == "picture" else f" ({canvas.name})"
    # a dollar sign would begin a formula
    lines = [_short(f"{picture.name}{grid}"), _short(f"\u201c{picture.answer}\u201d")]
    axes.set_title("\n".join(lines).replace("$", r"\$"), fontsize=7)
    if canvas.retained.all() or not canvas.retained.any():
        return
    height, width = (s / n for s, n in zip(canvas.pixels.shape[:2], canvas.retained.shape))
    for row, column in np.argwhere(canvas.retained):
        corner = (column * width - 0.5, row * height - 0.5)
        axes.add_patch(Rectangle(corner, width, height, fill=False, lw=0.8, ec=COLOURS["retained"]))


def _short(text: str) -> str:
    """The first characters of a name or an answer, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_LETTERS else f"{line[: MOST_LETTERS - 3]}..."


def _heat(axes: Any, canvas: Canvas, mass: np.ndarray) -> None:
    """The picture in grey, and the mass over it: what gets none stays dark grey."""
    height, width = canvas.pixels.shape[:2]
    axes.imshow(canvas.pixels.mean(axis=2), cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(mass, cmap="inferno", vmin=0, vmax=max(float(mass.max()), 1e-12), alpha=0.72, extent=extent)
