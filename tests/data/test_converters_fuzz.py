"""Every source's annotations, damaged at random: each damage is a named problem, a refusal in one line, or no damage to
the format. (Parquet is left out: its library may end the process.)"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from llava_sv.data.converters import get_converter
from llava_sv.data.sources import catalogue
from llava_sv.errors import UserError
from tests.data.converting import inputs_of
from tests.data.trees import makers

TRIES = 12
TOKEN = re.compile(rb'"[^"]*"|\d+')
VALUES = [b"null", b"[]", b"{}", b"-1", b"1e999", b'""', b"NaN", b"true", b'{"a":1}', b"[null]", b'["x"]', b'"../../x"']


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One to five bytes, stretches or values changed."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0:
            data = data[:at] + chance.randbytes(1) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + chance.randrange(1, 40) :]
        elif kind == 2:
            data = data[:at] + chance.randbytes(chance.randrange(1, 8)) + data[at:]
        elif kind == 3:
            data = data[:at]
        else:
            spans = [found.span() for found in TOKEN.finditer(data)] or [(at, at)]
            start, end = chance.choice(spans)
            data = data[:start] + chance.choice(VALUES) + data[end:]
    return data


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_damage_is_told(name: str, tmp_path: Path) -> None:
    makers()[name](tmp_path)
    inputs = inputs_of(name, tmp_path)
    convert = get_converter(inputs.source.converter)
    files = [path for path in inputs.files if path.suffix not in (".parquet", ".arrow")]
    chance = random.Random(name)
    for _ in range(TRIES if files else 0):
        path = chance.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, chance))
        items, refusal = [], ""
        try:
            items += convert(inputs)
        except UserError as error:
            refusal = str(error)
        assert "\n" not in refusal
        assert not refusal or path.name in refusal or name in refusal
        for item in items:
            assert item.where
            assert (item.record is None) == bool(item.problem)
            assert "\n" not in item.problem
        path.write_bytes(whole)
