"""`llava-sv data shard`: what it packs is read back equal; killed, it goes on; what is wrong is named."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_sv.cli import main
from llava_sv.data import shard_formats
from llava_sv.data.image_store import ImageStore
from llava_sv.data.index import open_records
from llava_sv.data.lengths import image_sizes
from llava_sv.data.shard import shard_main
from llava_sv.errors import CANNOT_WRITE

FORMATS = ("tar", "parquet")


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def encoded(seed: int, kind: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9 + seed % 5, 11, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """23 records: one picture, none, two (one in a zip), sources, answers in several scripts, JPEGs named .png."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images" / "sub").mkdir(parents=True)
    records: list[dict] = []
    with zipfile.ZipFile(folder / "images" / "z.zip", "w") as archive:
        for number in range(23):
            name = f"sub/{number}.{('jpg', 'png', 'webp')[number % 3]}"
            (folder / "images" / name).write_bytes(encoded(number, ("JPEG", "PNG", "WEBP")[number % 3]))
            archive.writestr(f"{number}.bmp", encoded(100 + number, "BMP"))
            record: dict = {"id": f"r{number}", "conversations": turns("<image>\nWas?", f"Ä, 漢字 {number}\n\tx")}
            if number % 4 == 1:
                record["conversations"] = turns("Say it.", "It.")
            elif number % 4 == 2:
                record["image"] = [name, f"z.zip::{number}.bmp"]
                record["conversations"] = turns("<image> and <image>", "two")
            else:
                record["image"] = name
            if number % 2:
                record["source"] = f"source {number % 3}"
            records.append(record)
    shutil.copy(folder / "images" / "sub" / "0.jpg", folder / "images" / "sub" / "really_a_jpeg.png")
    records[0]["image"] = "sub/really_a_jpeg.png"
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def pack(data: Path, output: Path, *more: str, code: int = 0) -> None:
    argv = [str(data / "data.json"), "--image-folder", str(data / "images"), "--output", str(output)]
    assert main(["data", "shard", *argv, *more]) == code


def sums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != ".lock"
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_records_are_read_back_equal(data, tmp_path, kind):
    pack(data, tmp_path / "out", "--format", kind, "--samples-per-shard", "7", "--json", str(tmp_path / "report.json"))
    before, after = open_records(data / "data.json"), open_records(tmp_path / "out")
    images, packed = ImageStore(data / "images"), ImageStore(after.image_root)
    assert len(before) == len(after) == 23
    for number, (one, other) in enumerate(zip(before, after)):
        assert (one.id, one.turns) == (other.id, other.turns)
        assert before.source_of(number) == after.source_of(number)
        assert [images.bytes(ref) for ref in one.images] == [packed.bytes(ref) for ref in other.images]
        assert [images.size(ref) for ref in one.images] == [packed.size(ref) for ref in other.images]
    assert after.shard_starts.tolist() == [0, 7, 14, 21, 23]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == json.loads((tmp_path / "report.json").read_text())
    assert (manifest["kind"], manifest["format"], manifest["samples"]) == ("shards", kind, 23)
    assert [shard["samples"] for shard in manifest["shards"]] == [7, 7, 7, 2]
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]}.items() <= sums(tmp_path / "out").items()
    assert manifest["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob(f"*.{kind}"))
    assert sorted(sums(tmp_path / "out")) == [f"00000{n}.{kind}" for n in range(4)] + ["manifest.json"]


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_input_gives_equal_bytes_whoever_packs(data, tmp_path, kind):
    pack(data, tmp_path / "one", "--format", kind, "--samples-per-shard", "5", "--workers", "1")
    time.sleep(1.1)  # a time of writing, were there one in a tar, counts seconds
    pack(data, tmp_path / "three", "--format", kind, "--samples-per-shard", "5", "--workers", "3")
    assert sums(tmp_path / "one") == sums(tmp_path / "three")


def test_shards_packed_again_from_shards_are_the_same(data, tmp_path):
    pack(data, tmp_path / "tar", "--samples-per-shard", "7")
    argv = [str(tmp_path / "tar"), "--output", str(tmp_path / "again"), "--samples-per-shard", "7"]
    assert shard_main(argv) == 0
    names = [f"00000{number}.tar" for number in range(4)]
    one, other = sums(tmp_path / "tar"), sums(tmp_path / "again")
    assert [one[name] for name in names] == [other[name] for name in names]


def test_a_tar_is_a_webdataset(data, tmp_path):
    """Any tar reader sees KEY.json and pictures, named by what they are, with nobody's time or name."""
    pack(data, tmp_path / "out", "--samples-per-shard", "100")
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        infos = tar.getmembers()
        names = [info.name for info in infos]
        assert names[:6] == [
            *("000000000.json", "000000000.jpg", "000000001.json", "000000002.json"),
            *("000000002.0.webp", "000000002.1.bmp"),
        ]
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in infos} == {(0, 0, 0, "", "")}
        record = json.load(tar.extractfile("000000002.json"))
    assert record == {
        "id": "r2",
        "image": ["000000002.0.webp", "000000002.1.bmp"],
        "conversations": turns("<image> and <image>", "two"),
    }


def test_parquet_has_small_row_groups_for_reading_anywhere(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_formats, "GROUP_BYTES", 1000)
    pack(data, tmp_path / "out", "--format", "parquet", "--workers", "1")
    file = pq.ParquetFile(tmp_path / "out" / "000000.parquet")
    assert file.schema_arrow.names == ["id", "source", "images", "speakers", "values"]
    assert file.metadata.num_row_groups > 3
    records = open_records(tmp_path / "out")
    store = ImageStore(records.image_root)
    assert store.bytes(records[22].images[1]) == encoded(122, "BMP")


def test_shards_are_closed_at_a_size(data, tmp_path):
    pack(data, tmp_path / "out", "--shard-bytes", "2kB")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    after = open_records(tmp_path / "out")
    store = ImageStore(after.image_root)
    ends = after.shard_starts.tolist()
    sizes = [
        sum(len(store.bytes(ref)) for number in range(*span) for ref in after[number].images)
        for span in itertools.pairwise(ends)
    ]
    assert len(manifest["shards"]) == len(sizes) > 3
    assert all(size <= 2000 for size in sizes)
    assert all(one + other > 1500 for one, other in itertools.pairwise(sizes)), "none is closed long before it is full"


# -- interrupted ------------------------------------------------------------------------------------------------------


def _pack_slowly(argv: list[str]) -> None:
    """In a process of its own, each picture taking its time."""
    original = ImageStore.bytes

    def slow(self, ref):
        time.sleep(0.06)
        return original(self, ref)

    ImageStore.bytes = slow  # type: ignore[method-assign]
    os._exit(shard_main(argv))


def _noted(output: Path) -> int:
    return len(list(output.glob(".progress/*.json")))


@pytest.mark.parametrize("kind", FORMATS)
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(data, tmp_path, kind):
    more = ["--format", kind, "--samples-per-shard", "2", "--workers", "2"]
    pack(data, tmp_path / "whole", *more)
    argv = [str(data / "data.json"), "--image-folder", str(data / "images"), "--output", str(tmp_path / "out"), *more]
    rng, noted = random.Random(kind), []
    for wanted in (0, 1, 4, 7):
        child = multiprocessing.get_context("fork").Process(target=_pack_slowly, args=(argv,))
        child.start()
        while child.is_alive() and _noted(tmp_path / "out") < wanted:
            time.sleep(0.005)
        child.join(rng.uniform(0, 0.2))
        assert child.is_alive(), "killed while it packs"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        noted.append(_noted(tmp_path / "out"))
    assert noted == sorted(noted), "what is done is not done again"
    pack(data, tmp_path / "out", *more)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_whole_shards_are_not_written_again(data, tmp_path):
    pack(data, tmp_path / "out", "--samples-per-shard", "5")
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    # as a run killed in the fourth shard leaves it
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "job.json").write_text(json.dumps({"job": manifest["job"]}))
    (tmp_path / "out" / ".progress").mkdir()
    for number, entry in enumerate(manifest["shards"][:3]):
        note = entry | {"records": [5 * number, 5 * number + 5], "left_out": []}
        (tmp_path / "out" / ".progress" / f"{entry['file']}.json").write_text(json.dumps(note))
    (tmp_path / "out" / ".000003.abc.tar").write_bytes(b"torn")
    assert main(["data", "stats", str(tmp_path / "out")]) == 2, "an unfinished folder is not read"
    pack(data, tmp_path / "out", "--samples-per-shard", "5")
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert sorted(name for name in made if made[name] != again[name]) == ["000003.tar", "000004.tar"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert not list((tmp_path / "out").glob(".0*"))


def test_a_finished_job_is_left_alone_and_another_is_refused(data, tmp_path, capsys):
    output = tmp_path / "out"
    pack(data, output)
    before = sums(output)
    pack(data, output)
    assert f"{output} is finished: nothing to do" in capsys.readouterr().out
    pack(data, output, "--samples-per-shard", "3", code=2)
    said = capsys.readouterr().err
    assert f"{output} holds shards of another job (other: samples_per_shard); choose another --output" in said
    assert sums(output) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    pack(data, tmp_path / "other", code=2)
    assert f"{tmp_path / 'other'} holds other files (mine.txt); choose an empty" in capsys.readouterr().err


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(data, tmp_path) -> Path:
    """The same with one picture gone and one cut short."""
    folder = tmp_path / "spoiled"
    shutil.copytree(data, folder)
    (folder / "images" / "sub" / "4.png").unlink()
    whole = (folder / "images" / "sub" / "7.png").read_bytes()
    (folder / "images" / "sub" / "7.png").write_bytes(whole[:60])
    return folder


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_picture_is_named(spoiled, tmp_path, capsys, workers):
    pack(spoiled, tmp_path / "out", "--workers", workers, "--samples-per-shard", "6", code=2)
    said = capsys.readouterr().err
    image = spoiled / "images" / "sub" / "4.png"
    assert f"error: record 'r4': no such image file: {image}; mend it, or leave such records out with" in said
    assert "Traceback" not in said
    image.write_bytes(encoded(4, "PNG"))
    pack(spoiled, tmp_path / "out", "--workers", workers, "--samples-per-shard", "6", code=2)
    said = capsys.readouterr().err
    assert f"error: record 'r7': image file {spoiled}/images/sub/7.png cannot be read" in said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_pictures_are_left_out_and_counted(spoiled, tmp_path, capsys):
    pack(spoiled, tmp_path / "out", "--missing-images", "skip", "--samples-per-shard", "6")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["left_out"]) == (21, 2)
    assert [line.split(":")[0] for line in manifest["left_out_records"]] == ["record 'r4'", "record 'r7'"]
    assert "21 samples in 4 shards" in capsys.readouterr().out
    ids = [record.id for record in open_records(tmp_path / "out")]
    assert ids == [f"r{number}" for number in range(23) if number not in (4, 7)]


def test_trusted_pictures_are_not_decoded(spoiled, tmp_path, capsys):
    (spoiled / "images" / "sub" / "4.png").write_bytes(encoded(4, "PNG"))
    pack(spoiled, tmp_path / "out", "--trust-images")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"] == 23


def test_verify_finds_one_changed_byte(data, tmp_path, capsys):
    output = tmp_path / "out"
    pack(data, output, "--samples-per-shard", "6", "--verify")
    total = sum(path.stat().st_size for path in output.glob("*.tar"))
    assert f"{output}: 4 shards, {total:,} bytes, all checksums are right" in capsys.readouterr().out
    assert main(["data", "shard", "--verify", str(output)]) == 0
    changed = bytearray((output / "000002.tar").read_bytes())
    changed[600] ^= 1
    (output / "000002.tar").write_bytes(changed)
    assert main(["data", "shard", "--verify", str(output)]) == 2
    assert f"{output}: 1 of 4 shards have changed: 000002.tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["data.json"], "say where the shards go with --output DIR"),
        (["data.json", "--output", "out"], "records hold images; say where with --image-folder DIR"),
        (["data.json", "--output", "out", "--image-folder", "nowhere"], "no such image folder: nowhere"),
        (
            ["data.json", "--output", "out", "--samples-per-shard", "0"],
            "--samples-per-shard: expected 1 or more, got 0",
        ),
        (["data.json", "--output", "out", "--workers", "0"], "--workers: expected 1 or more, got 0"),
        (["gone.json", "--output", "out"], "no such data file: gone.json"),
        (["--verify", "images"], "no such file: images/manifest.json; run llava-sv data shard"),
    ],
)
def test_mistakes_are_said_in_one_line(data, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(data)
    assert main(["data", "shard", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_size_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        shard_main(["x", "--shard-bytes", "lots"])
    assert left.value.code == 2
    assert "'lots': give bytes, such as 500MB or 1GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shards",
    [
        None,
        [{"file": "../up.tar", "bytes": 1, "sha256": "0"}],
        [{"file": "a.exe", "bytes": 1, "sha256": "0"}],
        [{"file": "a.tar", "sha256": "0"}],
        ["a.tar"],
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, capsys, shards):
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "shards", "shards": shards}))
    for argv in (["data", "stats", str(tmp_path)], ["data", "shard", "--verify", str(tmp_path)]):
        assert main(argv) == 2
        assert f"{tmp_path / 'manifest.json'}: is no manifest of shards" in capsys.readouterr().err


def test_a_full_disk_is_said(data, tmp_path, capsys, monkeypatch):
    def full(path, samples):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(shard_formats.FORMATS, "tar", full)
    for workers in ("1", "2"):
        pack(data, tmp_path / workers, "--workers", workers, "--samples-per-shard", "4", code=CANNOT_WRITE)
        said = "000000.tar: cannot be written (No space left on device); mend that, then run it again"
        assert said in capsys.readouterr().err
        assert not list((tmp_path / workers).glob("*.tar")) + list((tmp_path / workers).glob(".0*"))


def test_a_process_that_is_killed_is_said_and_the_command_goes_on(data, tmp_path, capsys, monkeypatch):
    original = ImageStore.bytes

    def deadly(self, ref):
        if "z.zip::14.bmp" in ref:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, ref)

    monkeypatch.setattr(ImageStore, "bytes", deadly)
    more = ["--workers", "2", "--samples-per-shard", "4"]
    pack(data, tmp_path / "out", *more, code=2)
    assert "a process that packs shards was killed (out of memory?); run the command again" in capsys.readouterr().err
    monkeypatch.undo()
    pack(data, tmp_path / "out", *more)
    pack(data, tmp_path / "whole", *more)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_the_other_commands_read_shards(data, tmp_path, capsys):
    pack(data, tmp_path / "out", "--samples-per-shard", "6")
    capsys.readouterr()
    assert main(["data", "stats", str(tmp_path / "out")]) == 0
    assert main(["data", "index", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "23 records, indexed in" in said


@pytest.mark.parametrize("kind", FORMATS)
def test_sizes_are_read_from_shards(data, tmp_path, kind):
    pack(data, tmp_path / "out", "--format", kind, "--samples-per-shard", "6")
    before, after = open_records(data / "data.json"), open_records(tmp_path / "out")
    sizes = image_sizes(before, data / "images")
    assert (sizes[:, 0] == 11).all()
    np.testing.assert_array_equal(image_sizes(after, tmp_path / "out"), sizes)
