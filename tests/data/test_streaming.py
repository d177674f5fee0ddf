"""The streamed order: a permutation, each epoch's own, near-sequential, and made as it is needed."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from llava_sv.data import streaming
from llava_sv.data.split import SomeRecords
from llava_sv.data.streaming import SHARDS_AT_ONCE, ShardSampler, shard_starts

STARTS = np.cumsum([0, *np.random.default_rng(0).integers(1, 200, 50)])


@pytest.mark.parametrize("window", [1, 7, 64, 1000, 10**6])
def test_it_is_a_permutation(window):
    sampler = ShardSampler(STARTS, window, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(STARTS[-1]))
    assert len(order) == len(sampler)
    assert list(sampler) == order
    assert all(isinstance(index, int) for index in order[:5])


def test_each_epoch_and_seed_has_its_own():
    orders = []
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        sampler = ShardSampler(STARTS, 64, seed)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 6
    assert all(set(order) == set(orders[0]) for order in orders)


def test_a_window_lies_in_few_shards_and_draws_on_each_alike():
    starts = np.arange(0, 33) * 100
    seen = []
    for window in ShardSampler(starts, 80, seed=1).windows():
        shards, counts = np.unique(window // 100, return_counts=True)
        assert len(window) == 80
        assert len(shards) == SHARDS_AT_ONCE
        assert set(counts.tolist()) == {10}
        assert (np.diff(window) < 0).any(), "shuffled within"
        places = np.sort(window % 100)
        assert places[-1] - places[0] == 9, "neighbours in each shard"
        seen.append(tuple(shards.tolist()))
    assert len(seen) == 40
    assert len(set(seen)) == 4, "eight shards are read to their ends, then the next eight"


def test_windows_are_of_about_the_asked_size():
    sizes = [len(window) for window in ShardSampler(STARTS, 100, seed=1).windows()]
    assert max(sizes) <= 100 + SHARDS_AT_ONCE


def test_sixty_five_million_samples_take_no_memory():
    total = 65_000_000
    sampler = ShardSampler(np.append(np.arange(0, total, 10_000), total), 8192)
    tracemalloc.start()
    first = list(itertools.islice(sampler, 100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(first)) == 100_000
    assert peak < 16 << 20


@pytest.mark.parametrize("starts", [[0], [1, 5], [0, 5, 5], [0, 5, 3]])
def test_bad_starts_are_refused(starts):
    with pytest.raises(ValueError, match="starts: expected 0"):
        ShardSampler(np.array(starts))


def test_a_window_of_none_is_refused():
    with pytest.raises(ValueError, match="window: expected 1 or more"):
        ShardSampler(STARTS, 0)


class Listed:
    """Records of which only the number counts."""

    path = None

    def __init__(self, count: int, starts: list[int] | None = None) -> None:
        self.count = count
        if starts:
            self.shard_starts = np.array(starts)

    def __len__(self) -> int:
        return self.count


def test_records_without_shards_are_cut_into_runs(monkeypatch):
    monkeypatch.setattr(streaming, "RUN", 4)
    assert shard_starts(Listed(10)).tolist() == [0, 4, 8, 10]
    assert shard_starts(Listed(8)).tolist() == [0, 4, 8]


def test_records_held_out_leave_shards_smaller():
    kept = SomeRecords(Listed(10, [0, 3, 6, 10]), np.array([0, 2, 6, 7, 9]))  # the second shard is held out whole
    assert shard_starts(kept).tolist() == [0, 2, 5]
