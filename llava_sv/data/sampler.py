"""The order of samples: batches of like length, text-only ones apart. Called by `train.llava_trainer`.

Lengths and modalities of all samples arrive, a permutation of their indices leaves, for each epoch its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCHES = 50
"""Global batches that are sorted together: more pads less and mixes less."""


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
        lengths: Sequence[int],
        modalities: Sequence[bool] | None = None,
        seed: int = 0,
    ) -> None:
        if not lengths:
            raise ValueError("lengths: expected at least one sample")
        if modalities is not None and len(modalities) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths but {len(modalities)} modalities")
        self.batch_size, self.global_batch = batch_size, batch_size * world_size
        self.lengths = torch.as_tensor(lengths)
        kinds = torch.zeros(len(lengths)) if modalities is None else torch.as_tensor(modalities)
        self._groups = [torch.nonzero(kinds == kind).flatten() for kind in kinds.unique()]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        batches: list[torch.Tensor] = []
        rests: list[torch.Tensor] = []
        for group in self._groups:
            shuffled = group[torch.randperm(len(group), generator=generator)]
            whole = len(shuffled) - len(shuffled) % self.global_batch
            batches += self._batches(shuffled[:whole])
            rests.append(shuffled[whole:])
        order = torch.randperm(len(batches), generator=generator).tolist()
        if order:
            longest = max(range(len(batches)), key=lambda index: int(self.lengths[batches[index]].max()))
            order.remove(longest)
            order.insert(0, longest)
        return iter(torch.cat([*(batches[index] for index in order), *rests]).tolist())

    def _batches(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Global batches, each sorted from long to short, out of stretches of `MEGABATCHES` sorted together."""
        stretch = self.global_batch * min(MEGABATCHES, max(1, len(indices) // (4 * self.global_batch)))
        batches: list[torch.Tensor] = []
        for piece in indices.split(stretch) if len(indices) else ():  # splitting nothing gives one empty piece
            batches += piece[self.lengths[piece].argsort(descending=True, stable=True)].split(self.global_batch)
        return batches
