"""Running a model without its numbers: floating-point tensors are shapes, whole numbers are real, bytes are counted.

`memory_trace` builds models and runs training steps inside a `Ghost`. Every operation of the real forward and backward
pass is carried out on shapes, so that what is kept for the backward pass, and for how long, is what torch keeps; an 8B
model takes seconds and no memory. Whole numbers and booleans stay real, since they decide shapes: labels, roles, masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves, tree_map

from llava_sv.bench.storages import StorageCount

UNKNOWN_SHAPE = (DataDependentOutputException, DynamicOutputShapeException)
FLAGS: tuple[Any, ...] = (torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)
"""Operations that answer yes or no; on tensors without numbers the answer is yes."""


def _is_wide(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class Ghost(StorageCount):
    """A mode in which tensors have no numbers; see `StorageCount` for what it counts."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation, on numbers where they are whole and known."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ghosts = any(isinstance(tensor, FakeTensor) for tensor in given)
        if func is torch.ops.aten._local_scalar_dense.default and ghosts:
            return 1.0
        if func in FLAGS and ghosts:
            return True
        if func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default:
            args = (args[0], _as_places(args[1]), *args[2:])
        try:
            with self._fake:
                out = func(*args, **kwargs)
        except UNKNOWN_SHAPE:
            if ghosts:
                raise
            return func(*args, **kwargs)
        if not ghosts and not any(isinstance(leaf, Tensor) and _is_wide(leaf) for leaf in tree_leaves(out)):
            return func(*args, **kwargs)
        made: dict[int, Tensor] = {}
        return tree_map(lambda leaf: _with_whole_numbers(func, leaf, made), out)


def _as_places(indices: Any) -> list[Tensor | None]:
    """Boolean masks as the places where they hold: how many there are is then known."""
    places: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            places += list(index.nonzero().unbind(1))
        else:
            places.append(index)
    return places


def _with_whole_numbers(func: Any, leaf: Any, made: dict[int, Tensor]) -> Any:
    """A whole-number result that hangs on numbers nobody has: zeros, or for a sort an order that is one."""
    if not isinstance(leaf, FakeTensor) or _is_wide(leaf):
        return leaf
    if id(leaf) not in made:
        real = torch.zeros(leaf.shape, dtype=leaf.dtype)
        if func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.topk) and leaf.dim():
            real += torch.arange(leaf.shape[-1], dtype=leaf.dtype)  # along the last dimension, as all here sort rows
        made[id(leaf)] = real
    return made[id(leaf)]
