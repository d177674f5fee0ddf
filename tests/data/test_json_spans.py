"""Stretches of a file together are the file: decoded one by one they give what reading the whole gives, lines and
errors included, wherever the cuts fall."""

import json
import random

import pytest

from llava_sv.data import json_spans, json_stream
from llava_sv.data.json_spans import spans
from llava_sv.data.json_stream import read_span, read_values
from llava_sv.errors import UserError
from tests.data.test_json_stream import _random_value


def by_spans(path, size):
    return [pair for span in spans(path, size=size) for pair in read_span(path, span)]


@pytest.mark.parametrize("size", [1, 100, 3000])
@pytest.mark.parametrize("read", [2, 50, 1 << 20])
@pytest.mark.parametrize("kind", ["array", "indented", "jsonl"])
def test_stretches_together_are_the_file(tmp_path, monkeypatch, size, read, kind):
    monkeypatch.setattr(json_spans, "READ_BYTES", read)
    rng = random.Random(size * read)
    odd = ['\\"', "\\\\", '"},{"', "[[", "}}", "\\", '\\\\"', "é\n", ","]
    values = [{"value": _random_value(rng), rng.choice(odd): "".join(rng.choices(odd, k=4))} for _ in range(40)]
    path = tmp_path / "data.json"
    if kind == "jsonl":
        text = "\r\n \n".join(json.dumps(value, ensure_ascii=False) for value in values)
    else:
        text = "\n " + json.dumps(values, indent=2 if kind == "indented" else None, ensure_ascii=False) + "\n"
    path.write_text("\ufeff" + text if size == 100 else text, encoding="utf-8")
    assert by_spans(path, size) == list(read_values(path))
    found = list(spans(path, size=size))
    assert len(found) > 10 or size > 100 or read < 50  # a comma has to be seen beside the bracket before it
    assert [span.end for span in found[:-1]] == [span.start for span in found[1:]]
    assert found[-1].end.offset == path.stat().st_size
    middle = len(found) // 2
    assert list(spans(path, after=found[middle], size=size)) == found[middle + 1 :]


@pytest.mark.parametrize("size", [1, 12, 1000])
@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1},\n {"a" 2}]',
        '[{"a": 1},\n {"a": 2} {"a": 3}]',
        '[{"a": 1},\n\n {"é": 2},]',
        '[{"a": 1}, {"é": "\n"}]',
        '[{"a": 1}, {"a": 2}',
        '[{"a": 1}, {"a": 2}] x',
        '[{"a": 1}, {"a": 2}]]',
        '[{"a": 1}, {"a": "2}]',
        "[,]",
        "[",
        '{"a": 1}\n{"a" 2}\n',
        '{"a": 1}\n[1,\n2]',
        "nothing",
    ],
)
def test_damage_is_told_as_by_reading_the_whole(tmp_path, text, size):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as whole:
        list(read_values(path))
    with pytest.raises(UserError) as apart:
        by_spans(path, size)
    assert str(apart.value) == str(whole.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b'[{"a": 1}, {"a": 2}, {"a": "\xff"}]')
    with pytest.raises(UserError, match=r"is not UTF-8 text \(near byte 28\)"):
        by_spans(path, 1)


@pytest.mark.parametrize("text", ["", " \n\t", "\ufeff"])
def test_an_empty_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json: is empty; expected LLaVA records"):
        by_spans(tmp_path / "a.json", 10)


def test_a_stretch_is_read_in_small_windows_too(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 3)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"é": "日" * n} for n in range(20)], ensure_ascii=False), encoding="utf-8")
    assert by_spans(path, 50) == [(1, {"é": "日" * n}) for n in range(20)]
