"""The order of samples: batches of like length, text-only ones apart. Called by `train.llava_trainer`.

Lengths and modalities of all samples arrive, a permutation of their indices leaves, for each epoch its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

MEGABATCHES = 50
"""Global batches that are sorted together: more pads less and mixes less."""

PIECE = 1 << 16


class LengthGroupedSampler(Sampler[int]):
    """A permutation in which every `batch_size` neighbours are of like length.

    batch_size: samples of one forward; world_size: forwards of one optimizer step, over ranks and accumulation: so
    many neighbouring batches are of one modality and of like length too. The batch with the longest sample comes
    first, so that memory runs out at once or never; samples that fill no global batch come last.
    modalities: whether each sample has an image; None: not told apart.
    Depends on `seed` and the epoch alone.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int] | np.ndarray,
        modalities: Sequence[bool] | np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("lengths: expected at least one sample")
        if modalities is not None and len(modalities) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths but {len(modalities)} modalities")
        self.batch_size, self.global_batch = batch_size, batch_size * world_size
        self.lengths = np.asarray(lengths)
        kinds = np.zeros(len(lengths), bool) if modalities is None else np.asarray(modalities, bool)
        index_type = np.int32 if len(lengths) < 2**31 else np.int64
        self._groups = [np.flatnonzero(kinds == kind).astype(index_type) for kind in np.unique(kinds)]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        whole: list[np.ndarray] = []
        rests: list[np.ndarray] = []
        for group in self._groups:
            shuffled = group[torch.randperm(len(group), generator=generator).numpy()]
            count = len(shuffled) - len(shuffled) % self.global_batch
            whole.append(self._sorted(shuffled[:count]))
            rests.append(shuffled[count:])
        batches = np.concatenate(whole).reshape(-1, self.global_batch)
        order = torch.randperm(len(batches), generator=generator).numpy()
        if len(order):
            longest = int(self.lengths[batches[:, 0]].argmax())
            order = np.concatenate([[longest], order[order != longest]])
        return in_pieces([batches[order].ravel(), *rests])

    def _sorted(self, indices: np.ndarray) -> np.ndarray:
        """Stretches of `MEGABATCHES` global batches, each from long to short; `indices` is overwritten."""
        stretch = self.global_batch * min(MEGABATCHES, max(1, len(indices) // (4 * self.global_batch)))
        for start in range(0, len(indices), stretch):
            piece = indices[start : start + stretch]
            piece[:] = piece[np.argsort(-self.lengths[piece], kind="stable")]
        return indices


def in_pieces(parts: Iterable[np.ndarray]) -> Iterator[int]:
    """The numbers of all parts as Python's, a few at a time: all at once would take ten times the memory."""
    for part in parts:
        for start in range(0, len(part), PIECE):
            yield from part[start : start + PIECE].tolist()
