"""A source's sample made and converted through its catalogue entry; and whether what its records name is there."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_sv.data.converters import get_converter
from llava_sv.data.converters.items import Inputs, Item
from llava_sv.data.image_refs import parse_ref
from llava_sv.data.records import check_record
from llava_sv.data.sources import catalogue
from llava_sv.errors import UserError
from tests.data.trees import makers


def inputs_of(name: str, root: Path, **options: Any) -> Inputs:
    """The source's inputs below `root`, some of its options changed."""
    source = catalogue()[name]
    source = dataclasses.replace(source, options=source.options | options)
    files = [path for pattern in source.annotations for path in sorted(root.glob(pattern))]
    return Inputs(source, root, tuple(files))


def convert(name: str, root: Path, **options: Any) -> list[Item]:
    inputs = inputs_of(name, root, **options)
    return list(get_converter(inputs.source.converter)(inputs))


def records(name: str, root: Path, **options: Any) -> list[dict[str, Any]]:
    """Of a sample in which nothing is wrong."""
    items = convert(name, root, **options)
    assert [item.problem for item in items if item.record is None] == []
    return [item.record for item in items if item.record is not None]


def sample(name: str, root: Path) -> list[dict[str, Any]]:
    """The records of the source's sample: as many as its maker says, fit for training, their pictures there."""
    count = makers()[name](root)
    found = records(name, root)
    assert len(found) == count
    for one in found:
        check_record(one, name)
        for image in images_of(one):
            picture_at(root, image)
    return found


def refusal(name: str, root: Path, **options: Any) -> str:
    """The one line in which the source as a whole is refused."""
    with pytest.raises(UserError) as caught:
        convert(name, root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def record(identity: str, image: str | list[str] | None, *said: str) -> dict[str, Any]:
    """A record by hand: what is said in turn, a human first."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(said)]
    return {"id": identity} | ({"image": image} if image else {}) | {"conversations": turns}


def images_of(record: dict[str, Any]) -> list[str]:
    given = record.get("image", [])
    return [given] if isinstance(given, str) else given


def picture_at(root: Path, text: str) -> Image.Image:
    """The picture that a reference names, found without the code under test."""
    ref = parse_ref(text)
    data = (root / ref.path).read_bytes()
    if ref.offset is not None and ref.size is not None:
        data = data[ref.offset : ref.offset + ref.size]
    elif ref.column is not None:
        value = pq.read_table(root / ref.path)[ref.column][ref.row].as_py()
        data = (value if ref.item is None else value[ref.item])["bytes"]
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def has_picture(root: Path, text: str) -> bool:
    ref = parse_ref(text)
    if ref.column is None:
        return (root / ref.path).is_file()
    value = pq.read_table(root / ref.path)[ref.column][ref.row].as_py()
    return bool((value if ref.item is None else value[ref.item])["bytes"])
