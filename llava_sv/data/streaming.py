"""The order of samples for data far larger than memory: shard by shard, shuffled as it goes. Called by
`train.llava_trainer` under `--streaming True`.

Where shards begin arrives, a permutation of all samples leaves, made a window at a time: no list of all samples exists,
and what is read lies in a few shards, in neighbouring places. A sample's place in the order is all that a resumption
needs, whatever the number of ranks: they share each batch among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from llava_sv.errors import UserError

SHARDS_AT_ONCE = 8
"""Shards that are read side by side, so that neighbours in one shard (one source, often) do not fill a batch."""

RUN = 10_000
"""Where data have no shards (one file, images in a folder), so many records in a row count as one."""

WINDOW = 8192


class ShardSampler(Sampler[int]):
    """A permutation of `starts[-1]` samples that depends on `seed` and the epoch alone.

    starts: the first sample of each shard and the number of samples, ascending int [shards + 1]. Shards are shuffled
    and taken `SHARDS_AT_ONCE` at a time; of these, windows of about `window` samples are made, each with an equal share
    of every shard, in the shards' own order from window to window, and shuffled within.
    """

    def __init__(self, starts: np.ndarray, window: int = WINDOW, seed: int = 0) -> None:
        if len(starts) < 2 or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise ValueError("starts: expected 0, then the first sample of each further shard and the end, ascending")
        if window < 1:
            raise ValueError(f"window: expected 1 or more, got {window}")
        self.starts, self.window, self.seed, self.epoch = np.asarray(starts), window, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[int]:
        for window in self.windows():
            yield from window.tolist()

    def windows(self) -> Iterator[np.ndarray]:
        """The permutation, window by window: int [about `window`]."""
        shards = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.starts) - 1)
        for number, first in enumerate(range(0, len(shards), SHARDS_AT_ONCE)):
            group = shards[first : first + SHARDS_AT_ONCE]
            begin, size = self.starts[group], self.starts[group + 1] - self.starts[group]
            count = -(-int(size.sum()) // self.window)
            random = np.random.default_rng([self.seed, self.epoch, number])
            for place in range(count):
                low, high = begin + size * place // count, begin + size * (place + 1) // count
                yield random.permutation(np.concatenate([np.arange(*span) for span in zip(low, high)]))


def shard_starts(records: Any) -> np.ndarray:
    """Where the shards of `records` begin, and their number: those they lie in, or runs of `RUN`; of records that were
    held out, what is left of each."""
    indices, whole = getattr(records, "indices", None), getattr(records, "records", records)
    starts = getattr(whole, "shard_starts", None)
    if starts is None:
        starts = np.append(np.arange(0, len(whole), RUN), len(whole))
    if indices is not None:
        starts = np.searchsorted(indices, starts)
    return np.unique(starts)


def check_streaming(data_args: Any, args: Any) -> str:
    """`UserError` for flags that need all samples' lengths, or another order; what is passed over, as a line to print.

    args: of training; its `group_by_modality_length`, which scripts set, is taken back.
    """
    if data_args.streaming_window < 1:
        raise UserError(f"--streaming_window: expected 1 or more, got {data_args.streaming_window}")
    if not data_args.streaming:
        return ""
    if data_args.packing:
        raise UserError("--streaming True orders samples as they lie in shards, --packing True by length: drop one")
    if args.train_sampling_strategy in ("sequential", "group_by_length"):
        raise UserError(
            f"--streaming True has an order of its own: drop --train_sampling_strategy {args.train_sampling_strategy}"
        )
    if args.group_by_modality_length:
        args.group_by_modality_length = False
        return "note: --streaming True knows no lengths: --group_by_modality_length is passed over"
    return ""
