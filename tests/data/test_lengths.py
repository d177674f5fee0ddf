"""Exact lengths against each sample's own; kept on disk, and counted again when anything they depend on changes."""

import numpy as np
import pytest
from PIL import Image

from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.conversation import get_template
from llava_sv.data import lengths as module
from llava_sv.data.lengths import exact_lengths, image_sizes, text_lengths
from llava_sv.data.preprocess import preprocess
from tests.data.samples import open_records, text_only, with_image, write_images
from tests.tokenizers_util import llama_2_tokenizer, llama_3_tokenizer

TEMPLATE = get_template("llama_3")


def records_of(folder, count=6):
    values = [
        with_image(str(i), ["a.png", "b.png"][: 1 + i % 2], "<image>" * (1 + i % 2) + f" what {'so ' * i}?")
        if i % 3
        else text_only(str(i), answer="Two. " * (i + 1))
        for i in range(count)
    ]
    return open_records(folder, values)


def test_text_is_counted_as_it_is_tokenised(tmp_path):
    records, tokenizer = records_of(tmp_path), llama_3_tokenizer()
    ids = [preprocess(record, tokenizer, TEMPLATE)["input_ids"] for record in records]
    assert text_lengths(records, tokenizer, TEMPLATE).tolist() == [int((x != IMAGE_TOKEN_INDEX).sum()) for x in ids]


def test_in_workers_the_same(tmp_path, monkeypatch):
    records, tokenizer = records_of(tmp_path, 40), llama_3_tokenizer()
    alone = text_lengths(records, tokenizer, TEMPLATE).copy()
    monkeypatch.setattr(module, "CHUNK", 3)
    for name in records.index_path.parent.glob("*.npy"):
        name.unlink()
    assert text_lengths(records, tokenizer, TEMPLATE).tolist() == alone.tolist()


def test_counted_once_for_a_tokenizer_and_a_template(tmp_path, monkeypatch):
    records = records_of(tmp_path)
    first = text_lengths(records, llama_3_tokenizer(), TEMPLATE)
    other = text_lengths(records, llama_3_tokenizer(), get_template("plain"))
    llama_2 = text_lengths(records, llama_2_tokenizer(), get_template("v1"))
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, llama_2)
    monkeypatch.setattr(module, "preprocess", None)  # would be needed to count
    assert np.array_equal(text_lengths(records, llama_3_tokenizer(), TEMPLATE), first)
    with pytest.raises(TypeError):
        text_lengths(records, llama_3_tokenizer(), get_template("llama_2"))


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    folder = write_images(tmp_path / "images", a=(8, 4))
    turned = Image.new("RGB", (10, 6))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "b.png", exif=exif)
    records = open_records(
        tmp_path, [with_image("1", ["a.png", "b.png"], "<image><image>"), with_image("2", "none.png")]
    )
    assert image_sizes(records, folder).tolist() == [[8, 4], [6, 10], [0, 0]]


def test_images_count_by_their_size_where_it_matters(tmp_path):
    folder = write_images(tmp_path / "images", a=(8, 4), b=(4, 6))
    records = records_of(tmp_path)
    text = text_lengths(records, llama_3_tokenizer(), TEMPLATE)
    images = records.num_images

    same = exact_lengths(records, llama_3_tokenizer(), TEMPLATE, lambda size: 7, folder)
    assert same.tolist() == (text + 7 * images).tolist()

    def by_width(size):
        return 100 if size is None else size[0]

    sized = exact_lengths(records, llama_3_tokenizer(), TEMPLATE, by_width, folder)
    expected = [sum({"a.png": 8, "b.png": 4}[name] for name in record.images) for record in records]
    assert sized.tolist() == (text + np.array(expected)).tolist()
    (folder / "a.png").unlink()
    moved = folder.rename(tmp_path / "moved")
    unread = exact_lengths(records, llama_3_tokenizer(), TEMPLATE, by_width, moved)
    expected = [sum({"a.png": 100, "b.png": 4}[name] for name in record.images) for record in records]
    assert unread.tolist() == (text + np.array(expected)).tolist()
