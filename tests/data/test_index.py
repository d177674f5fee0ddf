"""The index against the records it was made of; its cache: found again, made anew for a changed file, never torn."""

import json
import multiprocessing
import os
import tracemalloc

import numpy as np
import pytest

from llava_sv.data import index_file, index_worker, json_spans, json_stream
from llava_sv.data.index import index_location, open_index
from llava_sv.data.records import check_record
from llava_sv.errors import UserError
from tests.data.samples import exchange, text_only, with_image, write_array


def _mixed(count):
    records = []
    for number in range(count):
        if number % 3 == 0:
            records.append(text_only(number, answer="é日" * number))
        elif number % 3 == 1:
            records.append(with_image(f"i{number}"))
        else:
            turns = exchange("<image> and <image>?", "Yes.") + exchange("Sure?", "No.")
            records.append({"id": number, "image": ["a.png", "b.png"], "conversations": turns})
    return records


def test_records_are_those_of_the_file_for_array_and_jsonl(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "BATCH_ROWS", 7)
    raw = _mixed(30)
    expected = [check_record(value, "f") for value in raw]
    array = open_index(write_array(tmp_path / "a.json", raw), tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, raw)))
    lines = open_index(tmp_path / "a.jsonl", tmp_path / "cache")
    assert len(array) == len(lines) == 30
    assert list(array) == list(lines) == expected
    assert array[-1] == expected[-1]
    assert np.array_equal(array.num_images, [len(record.images) for record in expected])
    assert np.array_equal(array.num_turns, [len(record.turns) for record in expected])
    assert np.array_equal(array.num_chars, [sum(len(t["value"]) for t in record.turns) for record in expected])
    with pytest.raises(IndexError):
        array[30]


def test_second_opening_reads_the_cache_and_a_changed_file_is_read_anew(tmp_path, monkeypatch):
    path = write_array(tmp_path / "a.json", _mixed(3))
    first = open_index(path, tmp_path / "cache")
    monkeypatch.setattr(index_worker, "read_span", lambda *a, **k: pytest.fail("the file was read again"))
    assert list(open_index(path, tmp_path / "cache")) == list(first)
    monkeypatch.undo()
    write_array(path, _mixed(4))
    changed = open_index(path, tmp_path / "cache")
    assert len(changed) == 4
    assert changed.index_path != first.index_path


def test_the_default_cache_is_that_of_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    path = write_array(tmp_path / "a.json", _mixed(2))
    assert open_index(path).index_path.parent == tmp_path / "hub" / "llava_sv"


def test_a_bad_record_leaves_no_index_behind(tmp_path):
    path = write_array(tmp_path / "a.json", [*_mixed(2), {"id": "bad"}])
    with pytest.raises(UserError, match=r"a\.json line 1: record 'bad': has no field 'conversations'"):
        open_index(path, tmp_path / "cache")
    assert [name for name in os.listdir(tmp_path / "cache") if name.endswith(".arrow")] == []


@pytest.mark.parametrize("text", ["[]", "[ \n]"])
def test_an_array_without_records(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: holds no records"):
        open_index(tmp_path / "a.json", tmp_path / "cache")
    assert not index_location(tmp_path / "a.json", tmp_path / "cache").exists()


def test_absent_file(tmp_path):
    with pytest.raises(UserError, match=r"no such data file: .*a\.json"):
        open_index(tmp_path / "a.json")


def _open_in_process(path, cache, queue):
    queue.put(len(open_index(path, cache)))


def test_several_processes_may_open_at_once(tmp_path):
    path = write_array(tmp_path / "a.json", _mixed(50))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_open_in_process, args=(path, tmp_path / "cache", queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [50, 50, 50]
    for worker in workers:
        worker.join()
    assert len([name for name in os.listdir(tmp_path / "cache") if name.endswith(".arrow")]) == 1


def test_memory_stays_small_whatever_the_array(tmp_path, monkeypatch):
    """Indexing 24 MB of records holds a window of text and a batch, not the file."""
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(json_spans, "SPAN_BYTES", 1 << 20)
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[")
        file.write(",".join(json.dumps(text_only(number, answer="word " * 200)) for number in range(22000)))
        file.write("]")
    assert path.stat().st_size > 24e6
    tracemalloc.start()
    try:
        assert len(open_index(path, tmp_path / "cache")) == 22000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6
