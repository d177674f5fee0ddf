"""Counting the bytes of live tensors as operations make them and Python and autograd let them go.

`Ghost` counts tensors without numbers with it, `memory_measure` real ones.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageCount(TorchDispatchMode):
    """A mode in which the bytes of live storages are counted by label.

    live: label -> bytes now. `label` names storages as they are made. on_change: called after each allocation. What a
    kernel takes and gives back inside one operation does not show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.label = "other"
        self.on_change: Callable[[], None] | None = None
        self._storages: dict[int, tuple[str, int, Any]] = {}

    @property
    def total(self) -> int:
        """Bytes of all live storages."""
        return sum(self.live.values())

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is allocated inside the block is counted under `label`."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count this tensor's storage under `label` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            old, size, ref = self._storages[key]
            self.live[old] -= size
            self.live[label] += size
            self._storages[key] = (label, size, ref)

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes of its storage, 0 where it was not made in this mode."""
        return self._storages.get(tensor.untyped_storage()._cdata, ("", 0, None))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(func, args, kwargs or {})
        grew = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                grew |= self._count(leaf)
        if grew and self.on_change is not None:
            self.on_change()
        return out

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor) -> bool:
        """Take note of a new storage; whether it is one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or tensor.device.type == "meta":
            return False
        size, label = storage.nbytes(), self.label
        self._storages[key] = (label, size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live[label] += size
        return size > 0

    def _forget(self, key: int) -> None:
        label, size, _ = self._storages.pop(key)
        self.live[label] -= size
