"""Spectral norms against an SVD, local gains against a dense Jacobian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava_sv.analysis.gains import LocalMap, gain_along, power_norm, steepest, upper_norm
from llava_sv.analysis.trajectory import differentiable_attention
from tests.analysis.walks import tiny_walk


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (32, 32), (1, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_spectral_norms_lie_on_either_side_of_the_svd(shape, seed):
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    truth = float(torch.linalg.matrix_norm(weight.double(), 2))
    assert power_norm(weight, 400) == pytest.approx(truth, rel=1e-3)
    assert power_norm(weight, 3) <= truth * (1 + 1e-9)
    assert truth <= upper_norm(weight) <= truth * min(shape) ** (2**-9) * (1 + 1e-6)


def test_the_upper_norm_where_all_singular_values_are_equal_and_where_there_are_none():
    assert upper_norm(3 * torch.eye(16)) == pytest.approx(3 * 16 ** (2**-9), rel=1e-6)
    assert upper_norm(torch.zeros(3, 4)) == power_norm(torch.zeros(3, 4)) == 0.0
    assert upper_norm(1e30 * torch.eye(2)) >= 1e30


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_layers_derivatives_against_its_dense_jacobian(decoder):
    walk = tiny_walk(decoder, seed=1)
    walk.model.double()
    walk.inputs = [
        {k: tuple(x.double() for x in v) if isinstance(v, tuple) else v for k, v in inputs.items()}
        for inputs in walk.inputs
    ]
    point = walk.embeds.double()
    shape, count = point.shape, point.numel()
    with differentiable_attention():
        dense = torch.autograd.functional.jacobian(lambda h: walk.layer(1, h), point).reshape(count, count)
        direction = torch.randn(shape, dtype=torch.float64)
        wanted = (dense @ direction.flatten()).view(shape)
        for forward in (True, False):
            local = LocalMap(lambda h: walk.layer(1, h), point, forward)
            near = {"rtol": 1e-4, "atol": 1e-5}  # the layer's norms compute in float32
            torch.testing.assert_close(local.jvp(direction), wanted, **near)
            torch.testing.assert_close(local.vjp(direction), (dense.T @ direction.flatten()).view(shape), **near)
            assert local.norm(direction, 300) == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-3)
            assert local.forward is forward, "forward derivatives fell back"
        along = gain_along(lambda h: walk.layer(1, h), point, direction)
        assert along == pytest.approx(float(wanted.norm() / direction.norm()), rel=1e-4)
        step = 3e-3
        ahead, behind = (walk.layer(1, point + sign * step * direction) for sign in (1, -1))
        secant = (ahead - behind) / (2 * step)
        assert along == pytest.approx(float(secant.norm() / direction.norm()), rel=1e-3)


def test_where_forward_derivatives_are_missing_the_backward_ones_serve():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    point, direction = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    local = LocalMap(Cube.apply, point)
    torch.testing.assert_close(local.jvp(direction), torch.tensor([9.0, 48.0]))
    assert not local.forward
    assert gain_along(Cube.apply, point, direction) == pytest.approx((9.0**2 + 48.0**2) ** 0.5 / 5)


def test_slopes_of_activations():
    assert steepest(F.silu) == pytest.approx(1.09984, abs=1e-4)
    assert steepest(F.relu) == pytest.approx(1.0, abs=1e-4)
