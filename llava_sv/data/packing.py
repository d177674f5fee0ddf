"""Packing: which samples share a row, so that no row is mostly padding. Called by `train.train`.

Lengths after skipping arrive; packs of up to `model_max_length` tokens leave, as a data set whose items are packs.
The packs are made once, from the seed; each epoch shuffles them. The collator flattens a batch of packs, and the model
keeps the samples of a row apart (`model.language_model.packed_attention`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset


def pack_by_length(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(members, starts): pack i holds the samples members[starts[i]:starts[i + 1]]. Best fit, longest first.

    A pack is no longer than `capacity`; a sample that is longer (training cuts it) has a pack of its own. Which of the
    samples of equal length go together depends on `seed`. The time does not grow with the number of open packs.
    """
    lengths = np.minimum(np.asarray(lengths, dtype=np.int64), capacity)
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    pack_of = np.empty(len(lengths), dtype=np.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room that is left in them
    rooms = 0  # bit r is set where a pack with room r waits
    count = 0
    for index in order.tolist():
        length = int(lengths[index])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            pack = waiting[room].pop()
            if not waiting[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, count
            count += 1
        pack_of[index] = pack
        if room - length:
            waiting[room - length].append(pack)
            rooms |= 1 << (room - length)
    return np.argsort(pack_of, kind="stable"), np.r_[0, np.bincount(pack_of, minlength=count).cumsum()]


class PackedDataset(Dataset):
    """Item i: the samples of pack i, a list of what `dataset` gives; never more tokens than `capacity`.

    dataset: a `LazySupervisedDataset`; lengths: of its samples in the spliced sequence.
    """

    def __init__(self, dataset: Any, lengths: np.ndarray, capacity: int, seed: int) -> None:
        self.dataset, self.capacity = dataset, capacity
        self.members, self.starts = pack_by_length(lengths, capacity, seed)
        self._lengths = np.minimum(lengths, capacity)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        wanted = self.pack(index)
        samples = [self.dataset[int(sample)] for sample in wanted]
        # what stands in for a record whose pictures cannot be read may be longer than it: it takes what room is left
        own = [sample["index"] == place for sample, place in zip(samples, wanted)]
        room = self.capacity - int(self._lengths[wanted[own]].sum())
        kept = []
        for sample, is_own in zip(samples, own):
            length = 0 if is_own else int(self._lengths[sample["index"]])
            if length <= room:
                kept.append(sample)
                room -= length
        return kept

    def pack(self, index: int) -> np.ndarray:
        """Indices of the samples of pack `index`."""
        return self.members[self.starts[index] : self.starts[index + 1]]

    @property
    def data_args(self) -> Any:
        """The data flags."""
        return self.dataset.data_args

    def image_problems(self) -> dict[str, int]:
        """See `LazySupervisedDataset.image_problems`."""
        return self.dataset.image_problems()

    def lengths(self, visual_tokens: Any = None) -> list[int]:
        """Tokens of each pack; `visual_tokens`, which a data set of samples asks, is counted already."""
        return np.add.reduceat(self._lengths[self.members], self.starts[:-1]).tolist()

    def longest(self, count: int, visual_tokens: Any = None) -> np.ndarray:
        """Up to `count` packs of the most tokens, the longest first."""
        return np.argsort(-np.asarray(self.lengths()), kind="stable")[:count]

    def samples_in(self, packs: Iterable[int]) -> int:
        """How many samples these packs hold together."""
        return sum(len(self.pack(pack)) for pack in packs)

    def describe(self) -> str:
        """How full the packs are, in words."""
        samples, packs = len(self.dataset), len(self)
        empty = 1 - int(self._lengths.sum()) / (packs * self.capacity)
        return (
            f"{samples:,} samples in {packs:,} packs of up to {self.capacity:,} tokens "
            f"({samples / packs:.1f} a pack, {empty:.1%} left empty)"
        )
