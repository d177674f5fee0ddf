"""Equations (9) to (13) by hand, and the softmax inequality on random logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llava_sv.analysis.recursion import accumulate, closed_form, gaussian_kl, holds, log, softmax_kl


def test_the_recursion_by_hand():
    errors = np.exp(accumulate(log([9.0, 2.0, 0.5]), log([1.0, 3.0, 4.0])))
    assert errors.tolist() == pytest.approx([0.0, 1.0, 2 * 1 + 3, 0.5 * 5 + 4])


def test_before_the_first_layer_that_skips_nothing_grows():
    errors = np.exp(accumulate(log([np.nan, np.nan, 3.0]), log([0.0, 2.0, 0.0])))
    assert errors.tolist() == pytest.approx([0.0, 0.0, 2.0, 6.0])
    assert accumulate(log([1.0, 1.0]), log([0.0, 0.0])).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.25, 3.0])
def test_the_closed_form_is_the_recursion_with_constants(gain):
    wanted = accumulate(log([gain] * 6), log([0.7] * 6))[-1]
    assert closed_form(math.log(gain), math.log(0.7), 6) == pytest.approx(wanted)
    if gain != 1:
        assert math.exp(wanted) == pytest.approx(0.7 * (gain**6 - 1) / (gain - 1))


def test_astronomic_bounds_stay_numbers():
    errors = accumulate(log([1e200] * 4), log([1.0] * 4))
    assert errors[-1] / math.log(10) == pytest.approx(600)
    assert np.isfinite(gaussian_kl(errors[-1], 1.0))


def test_the_gaussians_kl_is_that_of_the_gaussians():
    means, sigma = torch.tensor([1.0, -2.0, 0.5]), 1.7
    p, q = (torch.distributions.Normal(mean, sigma) for mean in (means, torch.zeros(3)))
    wanted = float(torch.distributions.kl_divergence(p, q).sum())
    assert math.exp(gaussian_kl(math.log(float(means.norm())), sigma)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("sigma", [1e-200, 1e200])
def test_a_sigma_whose_square_is_no_float(sigma):
    assert gaussian_kl(0.0, sigma) == pytest.approx(-math.log(2) - 2 * math.log(sigma))


def softmax_pair(seed, scale, move):
    random = np.random.default_rng(seed)
    z, other = scale * random.normal(size=30), None
    other = z + move * random.normal(size=30) * random.integers(0, 2, 30)
    p, q = (v - np.logaddexp.reduce(v) for v in (other, z))
    return float((np.exp(p) * (p - q)).sum()), other - z


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("move", [1e-3, 0.5, 3.0, 50.0])
def test_the_softmax_inequality(scale, move):
    for seed in range(50):
        kl, gap = softmax_pair(seed, scale, move)
        reach = gap.max() - gap.min()
        assert kl <= math.exp(softmax_kl(math.log(reach))) * (1 + 1e-9) + 1e-15
        assert kl <= (gap**2).sum() / 4 * (1 + 1e-9) + 1e-15, "(12) with sigma^2 = 2 holds for every softmax"


def test_the_softmax_inequality_is_tight_and_the_gaussian_one_is_no_theorem():
    """Two equal logits move apart by a little: KL -> a^2 / 2, which is (12) at sigma^2 = 2, and above it for larger."""
    move = 1e-3
    p, q = np.array([move, -move]), np.array([0.0, 0.0])
    p, q = p - np.logaddexp.reduce(p), q - np.logaddexp.reduce(q)
    kl = float((np.exp(p) * (p - q)).sum())
    assert kl == pytest.approx(math.exp(softmax_kl(math.log(2 * move))), rel=1e-3)
    assert kl == pytest.approx(math.exp(gaussian_kl(math.log(move * 2**0.5), 2**0.5)), rel=1e-3)
    assert kl > math.exp(gaussian_kl(math.log(move * 2**0.5), 2.1**0.5))


def test_what_holds():
    assert holds(log([1.0, 0.0]), log([1.0, 0.0])).all()
    assert not holds(log([1.0, 2.0]), log([1.0, 1.9])).all()
