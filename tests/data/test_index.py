"""The index against the records it was made of; its cache: found again, made anew for a changed file, never torn."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from llava_sv.data import index_file, index_worker, json_spans, json_stream
from llava_sv.data.index import IndexWriter, index_location, open_index, open_records
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


BOTH = """
import sys
sys.argv[0] = "llava-sv"
from llava_sv.data.cache import cache_folder
sys.modules["datasets"] = None
print(cache_folder())
del sys.modules["datasets"]
print(cache_folder())
import datasets
print(datasets.config.HF_DATASETS_CACHE / "llava_sv")
"""


@pytest.mark.parametrize(
    ("name", "value"), [("HF_HOME", "/a/hf"), ("HF_DATASETS_CACHE", "/a/sets"), ("XDG_CACHE_HOME", "/a/cache")]
)
def test_without_the_datasets_library_the_cache_is_in_the_same_place(name, value):
    kept = {key: text for key, text in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    command = [sys.executable, "-c", BOTH]
    done = subprocess.run(command, env={**kept, name: value}, capture_output=True, text=True, timeout=120, check=True)
    without, found, own = done.stdout.splitlines()
    assert without == found == own
    assert own.startswith(value)


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


# -- what --data_path may name ----------------------------------------------------------------------------------------


def _written(path, raw, sources=("",)):
    with IndexWriter(path) as writer:
        for number, value in enumerate(raw):
            writer.add(check_record(value, "f"), sources[number % len(sources)], number + 1)
    return path


def test_a_writer_makes_what_the_file_makes_but_for_source_and_line(tmp_path):
    raw = _mixed(30)
    folder = tmp_path / "mixture"
    _written(folder / "index.arrow", raw, ["coco", "gqa", ""])
    written, read = open_records(folder), open_records(write_array(tmp_path / "a.json", raw), tmp_path / "cache")
    assert list(written) == list(read)
    assert (written.path, written.index_path) == (folder, folder / "index.arrow")
    assert list(open_records(folder / "index.arrow")) == list(read)
    assert written.sources == ["", "coco", "gqa"]
    assert [written.sources[code] for code in written.source_codes] == ["coco", "gqa", ""] * 10
    assert [written.source_of(index) for index in (0, 1, -1)] == ["coco", "gqa", ""]
    assert written.lines.tolist() == list(range(1, 31))
    assert written.modality.tolist() == [bool(check_record(value, "f").images) for value in raw]
    assert (read.sources, set(read.lines.tolist())) == ([""], {1})


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = _written(tmp_path / "index.arrow", _mixed(3))
    before = path.read_bytes()
    with pytest.raises(AttributeError), IndexWriter(path) as writer:
        writer.add(None)
    with pytest.raises(UserError, match=r"index\.arrow: would hold no records"), IndexWriter(path):
        pass
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["index.arrow"]


def test_the_datasets_library_reads_the_file(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(index_file, "BATCH_ROWS", 4)
    raw = _mixed(10)
    rows = datasets.Dataset.from_file(str(_written(tmp_path / "index.arrow", raw, ["s"])))
    assert len(rows) == 10
    for row, value in zip(rows, raw):
        record = check_record(value, "f")
        assert (row["id"], tuple(row["images"]), row["source"]) == (record.id, record.images, "s")
        assert [{"from": a, "value": b} for a, b in zip(row["speakers"], row["values"])] == list(record.turns)


def _first_values(records, queue):
    queue.put([records[0], records[len(records) - 1]])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_get_two_paths_and_no_copy(tmp_path, method):
    records = open_records(_written(tmp_path / "index.arrow", _mixed(2000)))
    assert len(pickle.dumps(records)) < 1000
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_first_values, args=(records, queue))
    worker.start()
    assert queue.get(timeout=120) == [records[0], records[1999]]
    worker.join()


def test_a_batch_is_bounded_in_rows_and_in_text(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "BATCH_ROWS", 5)
    monkeypatch.setattr(index_file, "BATCH_CHARS", 1000)
    path = _written(tmp_path / "index.arrow", [text_only(n, answer="a" * (900 if n > 6 else 1)) for n in range(11)])
    assert [batch.num_rows for batch in index_file.read_batches(path)] == [5, 4, 2]


def test_images_of_some(tmp_path):
    records = open_records(_written(tmp_path / "index.arrow", _mixed(9)))
    assert records.images_of(["i1", "2", "nobody"]) == {"i1": ("a.png",), "2": ("a.png", "b.png")}


# -- what is no index -------------------------------------------------------------------------------------------------


def test_every_cut_of_an_index_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "BATCH_ROWS", 2)
    whole = _written(tmp_path / "index.arrow", _mixed(6)).read_bytes()
    path = tmp_path / "cut.arrow"
    for size in [0, 1, 7, 9, 100, *range(200, len(whole), 37), len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.arrow: is (cut off; delete it|no index of records \().*") as error:
            open_records(path)
        assert "\n" not in str(error.value)


def test_other_columns_and_other_layouts(tmp_path):
    path = tmp_path / "other.arrow"

    def write(schema):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array([], field.type) for field in schema], schema=schema))

    write(pa.schema([("text", pa.string()), ("n", pa.int32())]))
    with pytest.raises(
        UserError, match=r"other\.arrow: holds other columns \(text, n\) than an index of records; make"
    ):
        open_records(path)
    write(pa.schema(list(index_file.SCHEMA)[:7]))
    with pytest.raises(UserError, match=r"other\.arrow: has layout 1 and this version reads layout 2; make it again"):
        open_records(path)
    write(index_file.SCHEMA.with_metadata({"llava_sv_layout": "3"}))
    with pytest.raises(UserError, match="has layout 3 and this version reads layout 2"):
        open_records(path)
    path.write_text("no Arrow")
    with pytest.raises(UserError, match=r"other\.arrow: is no index of records \(.*\); make one with: llava-sv data"):
        open_records(path)


def test_a_folder_without_an_index(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no index\.arrow and no shards; name a folder that llava-sv data mix or shard made"
    ):
        open_records(tmp_path)
    with pytest.raises(UserError, match=r"no such data file: .*none\.arrow"):
        open_records(tmp_path / "none.arrow")
