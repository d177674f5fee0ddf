"""Every epoch a permutation; batches of one modality and like length; the same again from the same seed and epoch."""

import random

import pytest

from llava_sv.data.sampler import LengthGroupedSampler

RNG = random.Random(0)
LENGTHS = [RNG.randrange(10, 500) for _ in range(1003)]
MODALITIES = [RNG.random() < 0.7 for _ in range(1003)]


def _batches(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


def _padding(order, size):
    """Share of positions that padding would fill."""
    batches = _batches(order, size)
    total = sum(max(LENGTHS[index] for index in batch) * len(batch) for batch in batches)
    return 1 - sum(LENGTHS) / total


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1003])
@pytest.mark.parametrize("modalities", [None, MODALITIES])
def test_a_permutation(count, modalities):
    kinds = None if modalities is None else modalities[:count]
    sampler = LengthGroupedSampler(4, 2, LENGTHS[:count], kinds, seed=3)
    assert len(sampler) == count
    assert sorted(sampler) == list(range(count))


def test_global_batches_are_of_one_modality_but_for_the_rest():
    order = list(LengthGroupedSampler(4, 2, LENGTHS, MODALITIES, seed=0))
    whole = sum(kind // 8 for kind in (sum(MODALITIES), len(MODALITIES) - sum(MODALITIES)))
    batches = _batches(order, 8)
    assert all(len({MODALITIES[index] for index in batch}) == 1 for batch in batches[:whole])
    kinds = [MODALITIES[batch[0]] for batch in batches[:whole]]
    assert len({tuple(kinds[start : start + 20]) for start in range(0, 100, 20)}) > 1  # they are mixed over the epoch


def test_padding_is_a_fraction_of_a_random_orders():
    order = list(LengthGroupedSampler(4, 2, LENGTHS, MODALITIES, seed=0))
    shuffled = random.Random(1).sample(range(len(LENGTHS)), len(LENGTHS))
    assert _padding(order, 4) < 0.2 * _padding(shuffled, 4)


def test_the_longest_comes_first():
    short = [10] * 800
    short[123] = 1000
    for seed in range(5):
        assert 123 in list(LengthGroupedSampler(4, 2, short, seed=seed))[:8]


def test_seed_and_epoch_alone_decide():
    sampler = LengthGroupedSampler(4, 2, LENGTHS, MODALITIES, seed=5)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = LengthGroupedSampler(4, 2, LENGTHS, MODALITIES, seed=5)
    again.set_epoch(1)
    assert list(again) == second
    assert list(LengthGroupedSampler(4, 2, LENGTHS, MODALITIES, seed=6)) != first


def test_misaligned_input_is_refused():
    with pytest.raises(ValueError, match="3 lengths but 2 modalities"):
        LengthGroupedSampler(1, 1, [1, 2, 3], [True, False])
    with pytest.raises(ValueError, match="at least one sample"):
        LengthGroupedSampler(1, 1, [])
