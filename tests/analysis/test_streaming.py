"""Running statistics against numpy on all values at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llava_sv.analysis.streaming import Running


def test_in_pieces_as_at_once():
    random = np.random.default_rng(0)
    values = random.normal(1000.0, 0.01, 5000)  # close together, far from zero: what naive sums of squares lose
    edges = np.linspace(999.9, 1000.1, 2001)
    running = Running(edges)
    for piece in np.split(values, [7, 7, 1000, 3333]):
        running.add(piece)
    assert running.count == 5000
    assert running.mean == pytest.approx(values.mean(), rel=1e-12)
    assert running.deviation == pytest.approx(values.std(ddof=1), rel=1e-9)
    assert (running.least, running.largest) == (values.min(), values.max())
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert running.quantile(share) == pytest.approx(np.quantile(values, share), abs=2e-4)
    assert running.density() == pytest.approx(np.histogram(values, edges, density=True)[0])


def test_values_beyond_the_bins_are_counted_at_the_ends():
    running = Running(np.array([0.0, 1.0, 2.0]))
    running.add(np.array([-5.0, 0.5, 1.0, 2.0, 7.0]))
    assert running.bins.tolist() == [2, 3]
    assert (running.least, running.largest, running.mean) == (-5.0, 7.0, 1.1)


def test_nothing_and_one_value():
    running = Running(np.array([0.0, 1.0, 2.0]))
    running.add(np.array([]))
    assert all(map(math.isnan, (running.mean, running.deviation, running.quantile(0.5))))
    assert running.density().tolist() == [0.0, 0.0]
    running.add(np.array([[1.5]]))
    assert (running.mean, running.quantile(0.05), running.quantile(0.95)) == (1.5, 1.5, 1.5)
    assert math.isnan(running.deviation)
    assert running.numbers()["q50"] == 1.5
