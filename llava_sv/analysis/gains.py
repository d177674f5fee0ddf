"""How much a map can stretch a vector: spectral norms of matrices, and local gains of a layer by its derivatives.

Power iteration comes from below and never overshoots the true norm; what a proof needs is a bound from above, and
`upper_norm` gives one. Called by `lipschitz` and `error_bound`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

SQUARINGS = 7
"""Of the Gram matrix in `upper_norm`: overshoots by at most a factor rank ** (1 / 2 ** 9), 1.6% for 4096 rows."""


def power_norm(weight: Tensor, iterations: int = 50, seed: int = 0) -> float:
    """Largest singular value of a matrix [m, n] by power iteration on its Gram matrix: from below."""
    matrix = weight.double()
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vector = vector.to(matrix.device)
    gain = 0.0
    for _ in range(iterations):
        length = float(vector.norm())
        if length == 0.0:
            return 0.0
        image = matrix @ (vector / length)
        gain = float(image.norm())
        vector = matrix.T @ image
    return gain


def upper_norm(weight: Tensor, squarings: int = SQUARINGS) -> float:
    """The largest singular value of a matrix [m, n], or a little more, never less.

    With G the smaller Gram matrix and m = 2 ** squarings, s_max ** (2 m) is at most the root of the sum of all
    s_i ** (4 m), which is the Frobenius norm of G ** m. G is scaled before it is squared, so that nothing overflows.
    """
    matrix = weight.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    logarithm, share = 0.0, 1.0
    for _ in range(squarings):
        size = float(gram.norm())
        if size == 0.0:
            return 0.0
        logarithm += share * torch.tensor(size, dtype=torch.float64).log().item()
        gram = gram / size
        gram, share = gram @ gram, share / 2
    logarithm += share * gram.norm().log().item()
    return float(torch.tensor(logarithm / 2, dtype=torch.float64).exp()) * (1 + 1e-9)


class LocalMap:
    """A map [..] -> [..] at one point, linearised: products with its Jacobian J from both sides.

    Forward derivatives where every operation has them; else they are had by going backward twice, which is the same.
    """

    def __init__(self, function: Map, point: Tensor, forward: bool = True):
        self.function, self.point, self.forward = function, point.detach(), forward
        self._variable = self.point.clone().requires_grad_()
        with torch.enable_grad():
            self._value = function(self._variable)
            self._dual = torch.zeros_like(self._value).requires_grad_()
            (self._pulled,) = torch.autograd.grad(self._value, self._variable, self._dual, create_graph=True)

    def jvp(self, direction: Tensor) -> Tensor:
        """J v."""
        if self.forward:
            try:
                return torch.func.jvp(self.function, (self.point,), (direction,))[1]
            except (NotImplementedError, RuntimeError):
                self.forward = False
        # J^T u is linear in u, so its derivative along v is J v
        return torch.autograd.grad(self._pulled, self._dual, direction, retain_graph=True)[0]

    def vjp(self, direction: Tensor) -> Tensor:
        """J^T u."""
        return torch.autograd.grad(self._value, self._variable, direction, retain_graph=True)[0]

    def norm(self, start: Tensor, iterations: int) -> float:
        """The largest gain ||J v|| / ||v||, by power iteration from `start`: from below."""
        vector, gain = start, 0.0
        for _ in range(iterations):
            length = vector.norm()
            if float(length) == 0.0:
                return gain
            image = self.jvp(vector / length)
            gain = max(gain, float(image.double().norm()))
            vector = self.vjp(image)
        return gain


def gain_along(function: Map, point: Tensor, direction: Tensor) -> float:
    """||J v|| / ||v|| at `point` for the direction v."""
    unit = direction / direction.norm()
    try:
        return float(torch.func.jvp(function, (point,), (unit,))[1].double().norm())
    except (NotImplementedError, RuntimeError):
        return float(LocalMap(function, point, forward=False).jvp(unit).double().norm())


def steepest(activation: Map, reach: float = 20.0, step: float = 1e-4) -> float:
    """The largest slope of an elementwise activation, from a fine grid; the slope's own slope, at most 1 for all
    that language models use, covers what lies between its points."""
    grid = torch.arange(-reach, reach, step, dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(activation(grid).sum(), grid)
    return float(slopes.abs().max()) + step / 2
