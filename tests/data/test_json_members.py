"""`read_members` against `json.load`, with windows of every size; what is malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sv.data import json_stream
from llava_sv.data.json_stream import read_members
from llava_sv.errors import UserError

WHOLE: dict[str, Any] = {
    "info": {"version": "1.0", "list": [1, [2]]},
    "year": 2017,
    "empty": [],
    "questions": [{"q": 'a, ]}"', "n": 1234567}, [], "x\u00e9", None, -12.5e3, 1234567],
    "last": 123456,
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64, 1 << 20])
def test_members(indent: int | None, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(WHOLE, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    found: dict[str, Any] = {}
    for key, _, value in read_members(path):
        if isinstance(WHOLE[key], list):
            found.setdefault(key, []).append(value)
        else:
            found[key] = value
    assert found == {key: value for key, value in WHOLE.items() if value != []}


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1,\n2,\n\n {"b":\n3}],\n"c": "d"}')
    assert list(read_members(path)) == [("a", 1, 1), ("a", 2, 2), ("a", 4, {"b": 3}), ("c", 6, "d")]


def test_an_empty_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(" { } ")
    assert list(read_members(path)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ("{", "malformed JSON at line 1 column 2: expected a key"),
        ("{1: 2}", "malformed JSON at line 1 column 2: expected a key"),
        ('{"a" 1}', "malformed JSON at line 1 column 6: expected ':' after a key"),
        ('{"a": 1', "malformed JSON at line 1 column 8: expected ',' or '}' after a value"),
        ('{"a": [1 2]}', "malformed JSON at line 1 column 10: expected ',' or ']' after an element"),
        ('{"a": [1,\n]}', "malformed JSON at line 2 column 1: expected a record after ','"),
        ('{"a": 1,}', "malformed JSON at line 1 column 9: expected a key"),
        ('{"a": 1} 2', "malformed JSON at line 1 column 10: text after the object's end"),
        ('{"a": [{"b": }]}', "malformed JSON at line 1 column 14: Expecting value"),
    ],
)
def test_malformed(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        list(read_members(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data file"):
        list(read_members(tmp_path / "a.json"))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="is not UTF-8 text"):
        list(read_members(path))
