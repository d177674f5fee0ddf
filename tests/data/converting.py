"""A source's sample through its catalogue entry, for the tests of the converters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llava_sv.data.converters import get_converter
from llava_sv.data.converters.items import Inputs, Item
from llava_sv.data.image_refs import parse_ref
from llava_sv.data.sources import catalogue


def inputs_of(name: str, root: Path) -> Inputs:
    source = catalogue()[name]
    return Inputs(source, root, tuple(path for glob in source.annotations for path in sorted(root.glob(glob))))


def convert(name: str, root: Path, **options: Any) -> list[Item]:
    """options: besides the entry's own, or in their place."""
    inputs = inputs_of(name, root)
    if options:
        inputs = replace(inputs, source=replace(inputs.source, options=inputs.source.options | options))
    return list(get_converter(inputs.source.converter)(inputs))


def record(identity: str, image: str | None, *said: str) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(said)]
    return {"id": identity} | ({"image": image} if image else {}) | {"conversations": turns}


def has_picture(root: Path, text: str) -> bool:
    ref = parse_ref(text)
    if ref.column is None:
        return (root / ref.path).is_file()
    return bool(pq.read_table(root / ref.path)[ref.column][ref.row].as_py()["bytes"])
