"""A batch by hand."""

import pytest
import torch

from llava_sv.constants import IGNORE_INDEX
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.errors import UserError
from tests.tokenizers_util import llama_3_tokenizer


def _sample(identity, ids, labels, images, sizes):
    return {
        "id": identity,
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "images": [torch.full((3, 2, 2), float(value)) for value in images],
        "image_sizes": sizes,
    }


SAMPLES = [
    _sample("a", [5, -200, 6, 7], [-100, -100, 6, 7], [1], [(4, 2)]),
    _sample("b", [5, 6], [-100, 6], [], []),
    _sample("c", [-200, -200, 6], [-100, -100, 6], [2, 3], [(1, 1), (9, 8)]),
]


def test_batch_by_hand():
    tokenizer = llama_3_tokenizer()
    pad = tokenizer.pad_token_id
    batch = DataCollatorForSupervisedDataset(tokenizer)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, -200, 6, 7], [5, 6, pad, pad], [-200, -200, 6, pad]]
    assert batch["labels"].tolist() == [
        [-100, -100, 6, 7],
        [-100, 6, IGNORE_INDEX, IGNORE_INDEX],
        [-100, -100, 6, IGNORE_INDEX],
    ]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert [float(image.mean()) for image in batch["images"]] == [1, 2, 3]
    assert batch["image_sizes"] == [(4, 2), (1, 1), (9, 8)]
    assert "ids" not in batch


def test_a_pad_token_that_is_also_the_end_token_stays_visible():
    tokenizer = llama_3_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    batch = DataCollatorForSupervisedDataset(tokenizer)([_sample("a", [5, end], [-100, end], [], []), SAMPLES[0]])
    assert batch["attention_mask"].int().tolist()[0] == [1, 1, 0, 0]
    assert batch["labels"].tolist()[0] == [-100, end, -100, -100]


def test_text_only_batch_and_ids():
    batch = DataCollatorForSupervisedDataset(llama_3_tokenizer(), with_ids=True)(SAMPLES[1:2])
    assert batch["images"] == []
    assert batch["image_sizes"] == []
    assert batch["ids"] == ["b"]


def test_a_tokenizer_without_pad_token_is_refused():
    tokenizer = llama_3_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="has no pad token"):
        DataCollatorForSupervisedDataset(tokenizer)
