"""Running statistics of any number of values in the memory of a histogram: what densities and quantiles are drawn from.

`ffn_impact` and `similarity` add an image's values at a time; nothing else of the image is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Running:
    """One quantity of one group. Count, mean, deviation, least and largest are exact; quantiles come from the bins.

    edges: [K + 1], rising. A value outside of them is counted in the first or the last bin.
    """

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self.bins = np.zeros(len(edges) - 1, dtype=np.int64)
        self.count = 0
        self.total = 0.0
        self.squares = 0.0
        """Squared distances from the mean so far."""
        self.least, self.largest = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """values: any shape, finite."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        if not flat.size:
            return
        inside = np.clip(flat, self.edges[0], self.edges[-1])
        self.bins += np.histogram(inside, self.edges)[0]
        # Chan's update: sums of squares alone lose the deviation of values that lie close together
        mean, count = float(flat.mean()), self.count + flat.size
        step = mean - self.mean if self.count else 0.0
        self.squares += float(((flat - mean) ** 2).sum()) + step**2 * self.count * flat.size / count
        self.total += float(flat.sum())
        self.count = count
        self.least, self.largest = min(self.least, float(flat.min())), max(self.largest, float(flat.max()))

    @property
    def mean(self) -> float:
        """NaN before the first value."""
        return self.total / self.count if self.count else float("nan")

    @property
    def deviation(self) -> float:
        """Standard deviation (n - 1); NaN for fewer than two values."""
        return float(np.sqrt(self.squares / (self.count - 1))) if self.count > 1 else float("nan")

    def quantile(self, share: float) -> float:
        """The value that `share` of all lie below, to within its bin; NaN before the first value."""
        if not self.count:
            return float("nan")
        below = np.concatenate([[0], np.cumsum(self.bins)]) / self.count
        index = min(int(np.searchsorted(below, share, side="left")) or 1, len(self.bins))
        low, high = below[index - 1], below[index]
        within = (share - low) / (high - low) if high > low else 1.0
        value = self.edges[index - 1] + within * (self.edges[index] - self.edges[index - 1])
        return float(min(max(value, self.least), self.largest))

    def density(self) -> np.ndarray:
        """[K], whose area is 1; zeros before the first value."""
        return self.bins / (max(self.count, 1) * np.diff(self.edges))

    def numbers(self, quantiles: Sequence[float] = QUANTILES) -> dict[str, float | int]:
        """For JSON."""
        return {
            "count": self.count,
            "mean": self.mean,
            "deviation": self.deviation,
            **{f"q{round(100 * share):02d}": self.quantile(share) for share in quantiles},
            "least": self.least,
            "largest": self.largest,
        }
