"""Packs: every sample once, none too long, nearly as few as can be, the same for a seed."""

import itertools

import numpy as np
import pytest

from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.data.packing import PackedDataset, pack_by_length
from tests.tokenizers_util import llama_3_tokenizer


def packs_of(lengths, capacity, seed=0):
    members, starts = pack_by_length(lengths, capacity, seed)
    return [members[a:b].tolist() for a, b in itertools.pairwise(starts)]


def plain_best_fit(lengths, capacity):
    """How many packs best fit makes, longest first, written plainly."""
    rooms: list[int] = []
    for length in sorted((min(length, capacity) for length in lengths), reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else capacity
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return len(rooms)


def test_by_hand():
    packs = packs_of([6, 5, 4, 3, 2], 10)
    assert sorted(sorted(pack) for pack in packs) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("capacity", [50, 64, 2048])
def test_every_sample_once_and_none_too_long(capacity):
    lengths = np.random.default_rng(1).integers(1, min(capacity, 700), 2000)
    lengths[5] = capacity + 100  # training cuts it
    packs = packs_of(lengths, capacity, seed=3)
    assert sorted(index for pack in packs for index in pack) == list(range(2000))
    assert all(np.minimum(lengths[pack], capacity).sum() <= capacity for pack in packs)
    assert len(packs) == plain_best_fit(lengths.tolist(), capacity)


def test_the_seed_decides_which_of_equal_length_go_together():
    lengths = [5] * 40
    assert packs_of(lengths, 10, 1) == packs_of(lengths, 10, 1)
    assert packs_of(lengths, 10, 1) != packs_of(lengths, 10, 2)


def test_nothing_to_pack():
    assert packs_of([], 10) == []


class Numbers:
    data_args = None

    def __len__(self):
        return 5

    def __getitem__(self, index):
        import torch

        ids = torch.arange(index + 1)
        return {"id": str(index), "index": index, "input_ids": ids, "labels": ids, "images": [], "image_sizes": []}


def test_packs_become_a_batch_that_says_how_they_are_made_up():
    packed = PackedDataset(Numbers(), np.arange(1, 6), capacity=6, seed=0)
    assert sorted(sorted(packed.pack(i).tolist()) for i in range(len(packed))) == [[0, 4], [1, 3], [2]]
    assert packed.samples_in(range(len(packed))) == 5
    assert packed.lengths() == [sum(sample + 1 for sample in packed.pack(i)) for i in range(len(packed))]
    assert [packed.lengths()[i] for i in packed.longest(2)] == [6, 6]
    assert packed.describe() == "5 samples in 3 packs of up to 6 tokens (1.7 a pack, 16.7% left empty)"
    collate = DataCollatorForSupervisedDataset(llama_3_tokenizer(), with_ids=True)
    items = [packed[i] for i in range(len(packed))]
    batch = collate(items)
    assert batch["packs"] == [len(item) for item in items]
    assert batch["ids"] == [sample["id"] for item in items for sample in item]
    assert batch["input_ids"].shape == (5, 5)
    assert "packs" not in collate(items[0])
