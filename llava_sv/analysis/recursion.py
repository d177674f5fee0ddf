"""Equations (9) to (13): errors that grow through layers, and what they mean for the output, as logarithms.

Bounds grow like a product over layers and overflow any float: everything here takes and gives natural logarithms, -inf
for zero. docs/Theory.md derives each line. L layers.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def log(values: Array | float | list[float]) -> Array:
    """Natural logarithm, -inf for 0."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(values, dtype=np.float64))


def log_mean(logarithms: Array) -> float:
    """Logarithm of the mean of what `logarithms` are those of."""
    return float(np.logaddexp.reduce(logarithms)) - math.log(len(logarithms))


def grown(log_gain: float, log_error: float) -> float:
    """log of gain times error. A gain of NaN was not measured, since the two inputs were one: nothing is passed on."""
    return -math.inf if log_error == -math.inf or math.isnan(log_gain) else float(log_gain + log_error)


def accumulate(log_gains: Array, log_new: Array) -> Array:
    """(9) and (10): log E [L + 1] with E_0 = 0 and E_(l+1) = gain_l E_l + new_l."""
    errors = [-math.inf]
    for gain, new in zip(log_gains, log_new, strict=True):
        errors.append(float(np.logaddexp(grown(gain, errors[-1]), new)))
    return np.array(errors)


def closed_form(log_gain: float, log_new: float, layers: int) -> float:
    """(11): new (gain^L - 1) / (gain - 1), as the geometric sum that it is, so that gain = 1 gives L new."""
    return log_new + float(np.logaddexp.reduce(np.arange(layers) * log_gain))


def gaussian_kl(log_error: Array | float, sigma: float) -> Array:
    """(12) and (13): KL of two Gaussians of covariance sigma^2 I whose means lie `error` apart: error^2 / (2 sigma^2).
    Equal where `error` is their distance, an upper bound where it bounds it."""
    # not the logarithm of sigma's square, which overflows and underflows long before sigma
    return 2 * np.asarray(log_error, dtype=np.float64) - math.log(2) - 2 * log(sigma)


def softmax_kl(log_range: Array | float) -> Array:
    """KL(softmax(z) || softmax(z')) is at most min(r, r^2 / 8), with r the range, max - min, of z - z'."""
    log_range = np.asarray(log_range, dtype=np.float64)
    return np.minimum(log_range, 2 * log_range - math.log(8))


def holds(log_measured: Array | float, log_bound: Array | float) -> Array:
    """measured <= bound, where both are known to float64's rounding."""
    measured, bound = np.broadcast_arrays(np.asarray(log_measured, float), np.asarray(log_bound, float))
    return (measured <= bound + 1e-9) | (measured == -math.inf)
