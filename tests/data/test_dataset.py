"""Samples against their parts; missing and corrupt pictures by policy, with counts over workers; the check on start."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.conversation import get_template
from llava_sv.data import dataset as dataset_module
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.data.dataset import LazySupervisedDataset, SampleError, describe_first_supervised
from llava_sv.data.index import Records
from llava_sv.data.preprocess import preprocess
from llava_sv.data.split import hold_out
from llava_sv.errors import UserError
from llava_sv.mm_utils import load_image, process_images
from tests.data.samples import data_args, exchange, image_processor, open_records, text_only, with_image, write_images
from tests.tokenizers_util import llama_2_tokenizer, llama_3_tokenizer


def _dataset(tmp_path, values, policy="error", tokenizer=None, template="llama_3", **changes):
    folder = write_images(tmp_path / "images", a=(8, 4), b=(4, 6))
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:40])
    arguments = data_args(folder, policy, **changes)
    return LazySupervisedDataset(
        open_records(tmp_path, values),
        tokenizer or llama_3_tokenizer(),
        image_processor(),
        arguments,
        get_template(template),
    )


def test_item_is_its_parts(tmp_path):
    two = with_image("two", ["b.png", "a.png"], "<image> or <image>?")
    data = _dataset(tmp_path, [two, text_only("text")])
    item = data[0]
    assert item["id"] == "two"
    expected = preprocess(data.records[0], data.tokenizer, data.template)
    assert torch.equal(item["input_ids"], expected["input_ids"])
    assert torch.equal(item["labels"], expected["labels"])
    pictures = [load_image(tmp_path / "images" / name) for name in ("b.png", "a.png")]
    pixels = process_images(pictures, data.image_processor, data.data_args)
    assert all(torch.equal(one, other) for one, other in zip(item["images"], pixels))
    assert item["images"][0].shape == (3, 16, 16)
    assert item["image_sizes"] == [(4, 6), (8, 4)]
    assert data[1]["images"] == []
    assert data[1]["image_sizes"] == []
    assert len(data) == 2


def test_image_aspect_ratio_is_honoured(tmp_path):
    values = [with_image(1)]
    padded, cropped = (
        _dataset(tmp_path, values, image_aspect_ratio=ratio)[0]["images"][0] for ratio in ("pad", "square")
    )
    assert padded[:, 0].abs().max() < 0.02  # the border
    assert cropped[:, 0].abs().max() > 0.5


def test_collated_batch_counts_an_image_for_each_mark(tmp_path):
    values = [with_image(1), text_only(2), with_image(3, ["a.png", "b.png"], "<image><image>")]
    data = _dataset(tmp_path, values)
    batch = DataCollatorForSupervisedDataset(data.tokenizer)([data[index] for index in range(3)])
    assert len(batch["images"]) == int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == 3


DAMAGED = [with_image(0), with_image(1, "gone.png"), with_image(2, "torn.png"), with_image(3, "b.png"), text_only(4)]


def test_policy_error_names_record_file_and_remedy(tmp_path):
    data = _dataset(tmp_path, DAMAGED, "error")
    with pytest.raises(
        UserError, match=r"record '1': no such image file: .*gone\.png; .* --missing_images skip or blank"
    ):
        data[1]
    with pytest.raises(UserError, match=r"record '2': image file .*torn\.png cannot be read"):
        data[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_policy_skip_takes_the_next_readable_record(tmp_path, workers):
    data = _dataset(tmp_path, DAMAGED, "skip")
    loader = DataLoader(data, batch_size=1, num_workers=workers, collate_fn=lambda items: items[0]["id"])
    assert list(loader) == ["0", "3", "3", "3", "4"]
    assert data.image_problems() == {"missing": 1, "corrupt": 2}  # record 2 is met from 1 and by itself


@pytest.mark.parametrize("workers", [0, 2])
def test_policy_blank_puts_the_mean_colour_in(tmp_path, workers):
    data = _dataset(tmp_path, DAMAGED, "blank")
    loader = DataLoader(data, batch_size=1, num_workers=workers, collate_fn=lambda items: items[0])
    items = list(loader)
    assert [item["id"] for item in items] == ["0", "1", "2", "3", "4"]
    for item in items[1:3]:
        assert item["images"][0].shape == (3, 16, 16)
        assert item["images"][0].abs().max() < 0.02
        assert item["image_sizes"] == [(16, 16)]
    assert data.image_problems() == {"missing": 1, "corrupt": 1}


def test_skip_wraps_around_and_never_loops_forever(tmp_path, monkeypatch):
    data = _dataset(tmp_path, [with_image(0), with_image(1, "gone.png")], "skip")
    assert data[1]["id"] == "0"
    nothing = _dataset(tmp_path, [with_image(number, "gone.png") for number in range(5)], "skip")
    with pytest.raises(UserError, match=r"5 records in a row from record number 2 .*gone\.png; check --image_folder"):
        nothing[2]
    monkeypatch.setattr(dataset_module, "MAX_SKIPS", 3)
    with pytest.raises(UserError, match="3 records in a row"):
        nothing[2]


def test_first_problems_are_warned_of_and_the_rest_counted(tmp_path, caplog):
    data = _dataset(tmp_path, [with_image(number, "gone.png") for number in range(6)], "blank")
    for index in range(6):
        data[index]
    assert len(caplog.records) == 3
    assert "record '0': no such image file" in caplog.text
    assert "further ones are only counted" in caplog.records[-1].getMessage()
    assert data.image_problems()["missing"] == 6


def test_an_error_in_a_worker_keeps_its_one_line(tmp_path):
    data = _dataset(tmp_path, [with_image(0, "gone.png")])
    loader = DataLoader(data, batch_size=1, num_workers=1, collate_fn=lambda items: items)
    with pytest.raises(SampleError) as caught:
        list(loader)
    assert str(caught.value).startswith("record '0': no such image file")
    assert "\n" not in str(caught.value)


def test_dataset_travels_to_spawned_workers(tmp_path):
    data = _dataset(tmp_path, DAMAGED, "skip")
    assert pickle.loads(pickle.dumps(data))[1]["id"] == "3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "ignore"}, "missing_images: unknown policy 'ignore'; known: error, skip, blank"),
        ({"is_multimodal": False}, "1 records hold images, but --is_multimodal is False"),
        ({"template": "v1"}, "template 'vicuna_v1' needs the token '</s>'"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        _dataset(tmp_path, [with_image(0), text_only(1)], **changes)


def test_images_without_folder_or_encoder_are_refused(tmp_path):
    records = open_records(tmp_path, [with_image(0)])
    tokenizer, template = llama_3_tokenizer(), get_template("plain")
    with pytest.raises(UserError, match="1 records hold images; say where with --image_folder"):
        LazySupervisedDataset(records, tokenizer, image_processor(), data_args(None), template)
    with pytest.raises(UserError, match="1 records hold images; give the model a --vision_tower"):
        LazySupervisedDataset(records, tokenizer, None, data_args(tmp_path), template)


def test_text_only_data_needs_neither_folder_nor_processor(tmp_path):
    records = open_records(tmp_path, [text_only(0)])
    arguments = data_args(None, is_multimodal=False)
    data = LazySupervisedDataset(records, llama_3_tokenizer(), None, arguments, get_template("llama_3"))
    assert data[0]["images"] == []
    assert data.lengths(lambda size: pytest.fail("no image to count")).tolist() == [len(data[0]["input_ids"])]


VALUES = [with_image(0), text_only(1, answer="word " * 30), with_image(2, ["a.png", "b.png"], "<image><image>")]


def test_lengths_are_text_plus_visual_tokens(tmp_path):
    data = _dataset(tmp_path, VALUES)
    sizes = []
    lengths = data.lengths(lambda size: sizes.append(size) or 50)
    expected = []
    for index in range(3):
        ids = data[index]["input_ids"]
        images = int((ids == IMAGE_TOKEN_INDEX).sum())
        expected.append(len(ids) - images + 50 * images)
    assert lengths.tolist() == expected
    assert data.modalities().tolist() == [True, False, True]


def test_lengths_of_large_data_are_estimated_well(tmp_path, monkeypatch):
    rng = random.Random(0)
    words = ["The", "square", "is", "réd,", "12", "circles,", "user's", "artificial", "intelligence."]
    values = [text_only(number, answer=" ".join(rng.choices(words, k=20 + number % 60))) for number in range(300)]
    values += [{"id": "m", "conversations": exchange("Why?", "So.") * 5}] * 20
    data = _dataset(tmp_path, values)
    exact = torch.from_numpy(data.lengths(lambda size: 0)).float()
    monkeypatch.setattr(dataset_module, "EXACT_LENGTHS", 100)
    monkeypatch.setattr(dataset_module, "SAMPLED_LENGTHS", 60)
    estimated = torch.from_numpy(data.lengths(lambda size: 0)).float()
    assert not torch.equal(exact, estimated)
    assert ((estimated - exact).abs() / exact).mean() < 0.15
    assert estimated.sum() / exact.sum() == pytest.approx(1, abs=0.06)
    assert torch.corrcoef(torch.stack([estimated, exact]))[0, 1] > 0.9


def test_first_sample_is_shown_with_its_supervised_text_marked(tmp_path):
    data = _dataset(tmp_path, [text_only(0, answer=" "), *VALUES[:1]])
    shown = describe_first_supervised(data, data.tokenizer)
    head, text = shown.split("\n", 1)
    assert head.startswith("record '0', images: a.png; ")
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[A square.<|eot_id|>]]"
    )


def test_data_in_which_nothing_is_supervised_is_refused(tmp_path):
    data = _dataset(tmp_path, [text_only(number, answer=" ") for number in range(3)])
    with pytest.raises(UserError, match=r"data\.json: nothing would be supervised in the 3 records .*'llama_3'"):
        describe_first_supervised(data, data.tokenizer)


def test_a_tokenizer_without_usable_offsets_is_refused(tmp_path, monkeypatch):
    from llava_sv import mm_utils
    from llava_sv.data import preprocess as preprocess_module

    def without_offsets(*args, **kwargs):
        encoded = mm_utils.encode_prompt(*args, **kwargs)
        encoded.offsets = [(0, 0)] * len(encoded.offsets)
        return encoded

    data = _dataset(tmp_path, VALUES)
    monkeypatch.setattr(preprocess_module, "encode_prompt", without_offsets)
    with pytest.raises(UserError, match="nothing would be supervised"):
        describe_first_supervised(data, data.tokenizer)


def test_plain_pretraining_sample(tmp_path):
    data = _dataset(
        tmp_path, [with_image(0, question="Describe it.\n<image>")], template="plain", tokenizer=llama_2_tokenizer()
    )
    assert describe_first_supervised(data, data.tokenizer).split("\n", 1)[1] == "<s><image>[[A square.\n]]"


def test_sizes_are_those_after_turning_upright(tmp_path):
    data = _dataset(tmp_path, [with_image(0, "turned.jpg")])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 3)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    assert data[0]["image_sizes"] == [(3, 9)]


@pytest.mark.parametrize("held_out", [0, 70])
@pytest.mark.parametrize("estimated", [False, True])
def test_the_longest_are_found_piece_by_piece(tmp_path, monkeypatch, held_out, estimated):
    rng = random.Random(1)
    values = [
        with_image(number, answer="Well. " * rng.randrange(40))
        if rng.random() < 0.5
        else text_only(number, answer="Well. " * rng.randrange(60))
        for number in range(300)
    ]
    monkeypatch.setattr("llava_sv.data.index_file.BATCH_ROWS", 32)
    data = _dataset(tmp_path, values)
    assert len(list(data.records.pieces())) > 5
    if held_out:
        data.records = hold_out(data.records, held_out, seed=0)[0]
    if estimated:
        monkeypatch.setattr(dataset_module, "EXACT_LENGTHS", 100)
        monkeypatch.setattr(dataset_module, "SAMPLED_LENGTHS", 60)
    expected = np.argsort(-data.lengths(lambda size: 20), kind="stable")[:40]
    if estimated:  # of 65 million records, a column takes a quarter of a gigabyte in each process
        monkeypatch.setattr(Records, "_column", lambda records, name: pytest.fail(f"read the whole column {name}"))
    assert data.longest(40, lambda size: 20).tolist() == expected.tolist()
