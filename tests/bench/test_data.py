"""`bench data` on a few records: its report's figures and their units, its synthetic records, its bad input."""

import json
import shutil
import types

import pytest

from llava_sv import cli
from llava_sv.bench import data as bench
from llava_sv.bench import data_loader
from llava_sv.bench.data_records import write_pictures, write_records
from llava_sv.data.json_stream import read_values
from llava_sv.data.records import check_record

WANTED = {
    "build_peak_bytes",
    "build_seconds",
    "open_seconds",
    "open_rss_bytes",
    "random_records_per_second",
    "json_load_seconds",
    "json_load_rss_bytes",
    "loader_images_per_second",
    "pil_images_per_second",
    "loader_ratio",
}


def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "JSON_RECORDS", 500)
    folder = tmp_path / "work"
    folder.mkdir()
    report_file = tmp_path / "report.json"
    assert cli.main(["bench", "data", "--records", "2000", "--dir", str(folder), "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert set(report) >= WANTED
    assert all(report[name] > 0 for name in WANTED - {"open_rss_bytes"})
    assert (report["records"], report["json_load_records"], report["json_load_scale"]) == (2000, 500, 4)
    assert 1 << 24 < report["build_peak_bytes"] < 2 << 30
    assert report["open_rss_bytes"] < 200 << 20
    assert report["json_bytes"] > report["index_bytes"] > 2000 * 100
    assert report["environment"]["date"]
    said = capsys.readouterr().out
    assert "| 2,000 records (0.0 GB of JSON) | index | `json.load` of 500, times 4 |" in said
    assert list(folder.iterdir()) == [], "its files are removed"


def test_records_are_valid_and_alike_by_seed(tmp_path):
    for name in ("a.json", "b.json", "a.jsonl"):
        write_records(tmp_path / name, 4100, seed=3, source="made", quiet=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    values = json.loads((tmp_path / "a.json").read_text())
    assert values == [value for _, value in read_values(tmp_path / "a.jsonl")]
    records = [check_record(value, "f") for value in values]
    assert len({record.id for record in records}) == len(records) == 4100
    assert 0.02 < sum(not record.images for record in records) / 4100 < 0.12
    assert {value["source"] for value in values} == {"made"}


def test_both_loops_make_the_same_pixels(tmp_path):
    write_pictures(tmp_path, data_loader.PICTURES)
    dataset = data_loader.make_dataset(tmp_path, seed=0)
    assert len(dataset) == data_loader.PICTURES
    for number in (0, 1):
        plain = data_loader.plain_pixels(tmp_path / f"{number:012d}.jpg")
        assert (dataset[number]["images"][0] - plain).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--records", "0"], "--records: expected 1 or more, got 0"),
        (["--workers", "0"], "--workers: expected 1 or more, got 0"),
        (["--dir", "nowhere"], "--dir: no such folder: nowhere"),
    ],
)
def test_bad_input(arguments, said, capsys):
    assert cli.main(["bench", "data", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=10**9))
    assert cli.main(["bench", "data", "--records", "9000000", "--dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"--records 9000000: needs 17.4 GB of disk in {tmp_path}, which has 1.0 GB free" in said
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_that_fails_is_told_in_one_line(tmp_path, capsys):
    with pytest.raises(bench.UserError, match="measuring open failed with exit code 1; see what it said above"):
        bench.measure("open", tmp_path / "none.arrow")
