"""The figure of `error-bound`: gains, errors and their bounds by layer, KL against its bounds. Axes count powers of
ten, since bounds overflow floats. n pictures, L layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_sv.analysis.bounds import PROVED, Arrays
from llava_sv.analysis.common import finite_mean
from llava_sv.analysis.plots import COLOURS, figure, whole_numbers

STYLES = {
    "secant": ("secant", COLOURS["bound"], "-"),
    "operator": ("operator norms", COLOURS["other"], "-"),
    "jvp": ("JVP along the error", COLOURS["dense"], "--"),
    "jvp_norm": ("JVP, any direction", COLOURS["summary"], "--"),
    "theorem": ("Theorem 5.1's products", COLOURS["text"], ":"),
}
"""Kind of gain -> its name, colour and line; what is proved is drawn through."""


def draw(measured: Arrays, bounds: Arrays, gains: Arrays) -> Any:
    """Three panels. measured, bounds and gains: arrays [n, ...], see `divergence.measure` and `bounds.bounds_of`."""
    made, axes = figure(columns=3, width=11.5, height=4.6)
    draw_gains(axes[0, 0], gains)
    draw_errors(axes[0, 1], measured, bounds)
    draw_kl(axes[0, 2], measured, bounds)
    return made


def ten(values: np.ndarray) -> np.ndarray:
    """Mean over pictures of natural logarithms, as log10; NaN where nothing is finite."""
    return finite_mean(values) / np.log(10)


def draw_gains(axis: Any, gains: Arrays) -> None:
    """Gamma by layer and kind, and the line that the paper's case needs it to stay under."""
    for kind, value in gains.items():
        label, colour, line = STYLES[kind]
        axis.plot(np.arange(value.shape[1]), ten(value), line, color=colour, marker="o", markersize=4, label=label)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.annotate("gamma = 1", (0, 0), (4, -11), xycoords=("axes fraction", "data"), textcoords="offset points",
                  fontsize=8)  # fmt: skip
    axis.margins(y=0.12)
    axis.set(title="Gain of a layer", xlabel="layer", ylabel="log10 of gamma")
    whole_numbers(axis)
    below(axis)


def draw_errors(axis: Any, measured: Arrays, bounds: Arrays) -> None:
    """What each layer adds, what is measured before each layer and after the last, and the recursions."""
    with np.errstate(divide="ignore"):
        new, error, kept = (np.log(measured[name]) for name in ("skip_error", "error", "error_kept"))
    axis.bar(np.arange(new.shape[1]) + 1, ten(new) - floor(new, error), bottom=floor(new, error), width=0.5,
             color=COLOURS["skipped"], alpha=0.45, label="new in the layer before")  # fmt: skip
    where = np.arange(error.shape[1])
    axis.plot(where, ten(error), color="black", marker="s", markersize=4, label="measured, all tokens")
    axis.plot(where, ten(kept), color="black", linestyle=":", marker="s", markersize=3, label="measured, not skipped")
    for kind, (name, colour, line) in STYLES.items():
        if f"error/{kind}" in bounds:
            axis.plot(where, ten(bounds[f"error/{kind}"]), line, color=colour, marker="o", markersize=4,
                      label=f"{'bound' if PROVED[kind] else 'no bound'}: {name}")  # fmt: skip
    axis.set(title="Error after so many layers, and (10)", xlabel="layers passed", ylabel="log10 of the length")
    whole_numbers(axis)
    below(axis)


def floor(*logarithms: np.ndarray) -> float:
    """A round number below all of them, where bars begin."""
    finite = [value[np.isfinite(value)] / np.log(10) for value in logarithms]
    together = np.concatenate(finite) if any(len(part) for part in finite) else np.zeros(1)
    return float(np.floor(together.min()) - 0.5)


def draw_kl(axis: Any, measured: Arrays, bounds: Arrays) -> None:
    """Each picture a point a bound: measured KL across, the bound upward; on or above the diagonal it holds."""
    with np.errstate(divide="ignore"):
        kl = np.log(measured["kl"]) / np.log(10)
    gaussian = bounds["kl_gaussian"] / np.log(10)
    points = [
        (kl, "kl_logits", "softmax KL: measured logits' range (proved)", COLOURS["skip"], "o"),
        (kl, "kl_softmax/secant", "softmax KL: secant recursion (proved)", COLOURS["fine"], "^"),
        (gaussian, "kl12/secant", "Gaussian KL: (12), secant recursion (proved)", COLOURS["bound"], "o"),
        (gaussian, "kl13/secant", "Gaussian KL: (13), secant recursion (proved)", COLOURS["skipped"], "^"),
        (kl, "kl_gaussian", "softmax KL: (12)'s Gaussian KL (no theorem)", COLOURS["text"], "x"),
    ]
    ends = []
    for across, name, label, colour, marker in points:
        upward = bounds[name] / np.log(10)
        drawn = np.isfinite(across) & np.isfinite(upward)
        axis.scatter(across[drawn], upward[drawn], s=14, color=colour, marker=marker, label=label)
        ends += [across[drawn], upward[drawn]]
    together = np.concatenate(ends)
    if len(together):
        axis.axline((float(together.min()), float(together.min())), slope=1, color="black", linewidth=0.8)
    axis.set(title="KL of the next token", xlabel="log10 of the measured KL",
             ylabel="log10 of the bound (holds above the line)")  # fmt: skip
    below(axis, 1)


def below(axis: Any, columns: int = 2) -> None:
    """The legend under the panel, off the data."""
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=columns)
