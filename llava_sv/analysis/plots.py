"""How figures look: one colour a role, one frame. Called by every `llava-sv analyze` command's `draw`; matplotlib is
imported only where something is drawn."""

from __future__ import annotations

from typing import Any

COLOURS = {
    "text": "#7f7f7f",
    "retained": "#2ca02c",
    "fine": "#98c379",
    "summary": "#9467bd",
    "skipped": "#ff7f0e",
    "visual": "#1f77b4",
    "dense": "#1f77b4",
    "skip": "#2ca02c",
    "bound": "#d62728",
    "other": "#8c564b",
}
"""By role, and by contender."""


def figure(columns: int = 1, width: float = 7.0, height: float = 4.2, rows: int = 1, **more: Any) -> tuple[Any, Any]:
    """(figure, axes [rows, columns]) without the upper and right spine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **more
    )  # fmt: skip
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return made, axes


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers across: layers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
