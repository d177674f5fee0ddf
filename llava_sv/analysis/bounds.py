"""From what was measured on one sequence to every bound of section 5, and which of them are proved.

`divergence.measure` gives the numbers, `error_bound` adds up what comes out. All logarithms are natural. L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_sv.analysis.lipschitz import LayerNorms
from llava_sv.analysis.recursion import (
    accumulate,
    closed_form,
    gaussian_kl,
    grown,
    holds,
    log,
    log_mean,
    softmax_kl,
)

Arrays = dict[str, np.ndarray]

PROVED = {"secant": True, "operator": True, "jvp": False, "jvp_norm": False, "theorem": False}
"""Kind of gain -> whether (10) with it is a proof."""

MEANING = {
    "secant": "||layer(x) - layer(y)|| / ||x - y|| of the two sequences: a measurement, exact by definition",
    "operator": "spectral norms with RMSNorm, grouped queries, the gated FFN and residuals, for these two sequences",
    "jvp": "largest Jacobian-vector product along x - y at three points between: first order, no proof",
    "jvp_norm": "largest gain of the Jacobian halfway in any direction, by power iteration: no proof",
    "theorem": "Theorem 5.1's products as the paper has them, without residual and norm: no proof",
}

DOMAIN = {
    "secant": "the two sequences of that picture, layer by layer; no other input",
    "operator": "the two sequences of that picture: roots of the RMSNorms, keys, queries, values and gates are theirs. "
    "Softmax attention and a gated FFN have no constant that holds for all inputs",
    "jvp": "a neighbourhood of three points on the segment between the two sequences",
    "jvp_norm": "a neighbourhood of the middle of that segment",
    "theorem": "claimed for all normalised inputs; a gated FFN and attention with unbounded values do not meet it",
}


@dataclass(frozen=True)
class Head:
    """lm_head's norms, see `lipschitz.head_norms`."""

    spectral: float
    range: float


def gains_of(measured: Arrays, norms: list[LayerNorms] | None, head_dim: int) -> Arrays:
    """log gain [L] by kind, of those that were measured; NaN where x and y are still one."""
    found = {kind: log(measured[f"gain_{kind}"]) for kind in ("secant", "operator", "jvp", "jvp_norm")}
    if norms is not None:
        found["theorem"] = log([sum(layer.theorem(head_dim)) for layer in norms])
    return {kind: gains for kind, gains in found.items() if kind == "secant" or np.isfinite(gains).any()}


def bounds_of(measured: Arrays, gains: Arrays, head: Head) -> Arrays:
    """log of every bound of one sequence.

    By kind of gain: `error/KIND` [L + 1], the recursion (10); `kept/KIND` [], the same for tokens that pass the last
    FFN, to which that layer adds nothing new; `closed_max/KIND` and `closed_mean/KIND` [], (11) with the largest and
    the mean gain and e; `kl12/KIND`, `kl13/KIND` [], (12) and (13) with the error carried on to the logits;
    `kl12_written/KIND` [], (12) with the error before lm_head in its place; `kl_softmax/KIND` [], ours.
    And from the measured logits: `kl_gaussian`, the KL that (12) is about, and `kl_logits`, our bound.
    """
    new = log(measured["skip_error"])
    sigma, final = float(measured["sigma"]), float(log(measured["final_norm"]))
    found = {
        "kl_gaussian": gaussian_kl(log(measured["logit_error"]), sigma),
        "kl_logits": softmax_kl(log(measured["logit_range"])),
    }
    for kind, gain in gains.items():
        error = accumulate(gain, new)
        kept = np.array(grown(gain[-1], error[-2]))
        known = gain[np.isfinite(gain)] if np.isfinite(gain).any() else np.zeros(1)
        carried = error[-1] + final + float(log(head.spectral))
        last = kept if float(measured["last_passes"]) else error[-1]
        similar = np.logaddexp(error[-1], log(measured.get("similarity_error", 0.0)))
        found |= {
            f"error/{kind}": error,
            f"kept/{kind}": kept,
            f"closed_max/{kind}": np.array(closed_form(float(known.max()), float(new.max()), len(new))),
            f"closed_mean/{kind}": np.array(closed_form(log_mean(known), log_mean(new), len(new))),
            f"kl12/{kind}": gaussian_kl(carried, sigma),
            f"kl13/{kind}": gaussian_kl(similar + final + float(log(head.spectral)), sigma),
            f"kl12_written/{kind}": gaussian_kl(error[-1], sigma),
            f"kl_softmax/{kind}": softmax_kl(last + final + float(log(head.range))),
        }
    return found


@dataclass(frozen=True)
class Check:
    """One inequality: `measured` (log) at most the bound `bound`; `proved`, or only claimed or hoped for."""

    measured: np.ndarray
    bound: np.ndarray
    proved: bool
    equation: str
    """What it is, in a few words."""

    @property
    def holds(self) -> bool:
        """At every layer, where it speaks of layers."""
        return bool(holds(self.measured, self.bound).all())

    @property
    def slack(self) -> np.ndarray:
        """log10 of bound / measured, NaN where nothing was measured."""
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(self.measured), (self.bound - self.measured) / np.log(10), np.nan)


def checks_of(measured: Arrays, bounds: Arrays) -> dict[str, Check]:
    """Every inequality of one sequence, by the name of its bound."""
    error, kept = log(measured["error"]), log(measured["error_kept"])
    kl, gaussian = log(measured["kl"]), bounds["kl_gaussian"]
    softmax = "softmax KL"
    checks = {
        "kl_logits": Check(kl, bounds["kl_logits"], True, f"{softmax}: min(r, r^2/8), r the measured logits' range"),
        "kl_gaussian": Check(kl, gaussian, False, "softmax KL against that of (12)'s Gaussians: no theorem"),
    }
    for name in [name for name in bounds if name.startswith("error/")]:
        kind = name.removeprefix("error/")
        sure = PROVED[kind]
        checks |= {
            name: Check(error, bounds[name], sure, "(10), by recursion, before each layer and after the last"),
            f"kept/{kind}": Check(kept[-1], bounds[f"kept/{kind}"], sure, "(10), tokens that pass the last FFN"),
            f"closed_max/{kind}": Check(error[-1], bounds[f"closed_max/{kind}"], sure, "(11), largest gain and e"),
            f"closed_mean/{kind}": Check(error[-1], bounds[f"closed_mean/{kind}"], False, "(11), mean gain and e"),
            f"kl12/{kind}": Check(gaussian, bounds[f"kl12/{kind}"], sure, "(12), Gaussian KL, error carried to logits"),
            f"kl13/{kind}": Check(gaussian, bounds[f"kl13/{kind}"], sure, "(13), Gaussian KL, error carried to logits"),
            f"kl12_written/{kind}": Check(gaussian, bounds[f"kl12_written/{kind}"], False,
                                          "(12) as written, Gaussian KL, error before lm_head"),
            f"kl_softmax/{kind}": Check(kl, bounds[f"kl_softmax/{kind}"], sure, f"{softmax}: min(r, r^2/8)"),
        }  # fmt: skip
    return checks
