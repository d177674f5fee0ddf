"""What a run notes of itself: over resumes, of its flags, its data, its code."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_sv import __version__
from llava_sv.files import sha256_of
from llava_sv.train import run_record
from llava_sv.train.train import train
from tests.data.mix_samples import recipe, run


def record_of(output):
    return json.loads((output / "train_summary.json").read_text())["record"]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Six steps with a checkpoint at the third; the last three were done twice, by a run that lost its end."""
    output = tmp_path_factory.mktemp("record") / "out"
    flags = world.flags("skip", output, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3")
    train(argv=flags)
    first = record_of(output)
    (output / "train_summary.json").unlink()
    shutil.rmtree(output / "checkpoint-6")
    (output / run_record.STARTS).write_text("".join(json.dumps(one) + "\n" for one in first["starts"]))
    train(argv=flags)
    return output, first


def test_a_run_knows_its_machine_and_versions(trained, world):
    record = trained[1]
    assert record["versions"]["llava_sv"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert record["hardware"]["devices"] == [{"name": "cpu process", "count": 1, "memory_bytes": None}]
    assert record["hardware"]["nodes"] == 1
    assert platform.node() not in json.dumps(record["hardware"])
    assert record["local_bases"] == [str(world.llm), str(world.clip)]
    assert record["started_utc"] <= record["ended_utc"]
    assert record["data"] is None
    assert not (trained[0] / run_record.STARTS).exists()


def test_gpus_of_all_ranks_are_counted_by_kind(monkeypatch):
    kinds = {0: SimpleNamespace(name="NVIDIA H100", total_memory=80), 1: SimpleNamespace(name="A100", total_memory=40)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: kinds[device.index])
    ranks = [(0, "one"), (0, "one"), (1, "two")]
    seen = [(run_record.device_of(SimpleNamespace(device=torch.device("cuda", kind))), host) for kind, host in ranks]
    found = run_record.hardware(seen)
    assert found["devices"] == [
        {"name": "NVIDIA H100", "count": 2, "memory_bytes": 80},
        {"name": "A100", "count": 1, "memory_bytes": 40},
    ]
    assert found["nodes"] == 2


def test_two_processes_note_both(two_processes):
    record = record_of(two_processes[2])
    assert record["hardware"]["devices"] == [{"name": "cpu process", "count": 2, "memory_bytes": None}]
    assert record["hardware"]["nodes"] == 1
    assert [one["world_size"] for one in record["starts"]] == [2]


def test_a_resumed_run_counts_all_its_starts(trained):
    output, first = trained
    record = record_of(output)
    assert [one["step"] for one in first["starts"]] == [0]
    assert [one["step"] for one in record["starts"]] == [0, 3]
    assert record["started_utc"] == first["started_utc"]
    seconds = json.loads((output / "train_summary.json").read_text())["train_seconds"]
    assert record["device_hours"] == pytest.approx(seconds / 3600, abs=2e-5)


def test_a_run_that_an_older_version_began_does_not_guess(trained, tmp_path, world):
    output = shutil.copytree(trained[0], tmp_path / "out")
    (output / "train_summary.json").unlink()
    shutil.rmtree(output / "checkpoint-6")
    train(argv=world.flags("skip", output, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"))
    record = record_of(output)
    assert (record["starts"], record["started_utc"], record["device_hours"]) == (None, None, None)
    assert record["ended_utc"]


def test_device_hours_add_up_over_starts():
    """2 devices for the 100 s up to step 5, then 8 from there to the end at 400 s."""
    rows = [{"step": step, "seconds": 20.0 * step} for step in range(1, 6)]
    starts = [{"step": 0, "world_size": 2}, {"step": 5, "world_size": 8}]
    expected = (2 * 100 + 8 * 300) / 3600
    assert run_record.device_hours(starts, rows, 400.0) == pytest.approx(expected, abs=1e-6)
    assert run_record.device_hours(starts[1:], rows, 400.0) is None
    assert run_record.device_hours([], rows, 400.0) is None


@pytest.mark.parametrize("text", ["", "{torn", "[1]\n", '{"step": 1}\n'])
def test_damaged_starts_are_none(tmp_path, text):
    path = tmp_path / run_record.STARTS
    path.write_text(text)
    assert run_record.read_starts(path) == []


@dataclass
class Some:
    changed: int = 1
    kept: int = 2
    off: bool | None = None
    known: int = 3
    hub_token: str | None = None
    some_token: str | None = None
    more: list = field(default_factory=list)
    thing: object = None


def test_flags_are_those_that_differ_and_no_secrets():
    part = Some(changed=7, off=False, known=9, hub_token="secret", some_token="secret", more=["a"], thing=object())
    assert run_record.flags((part,), {"known": 9}) == {"changed": 7, "more": ["a"]}


def test_a_mixture_is_known_by_its_manifest(world, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(world.data, root / "data")
    shared = {"converter": "llava_json", "images": "data/images"}
    kept = {**shared, "name": "kept", "annotations": "data/sft.json"}
    near = {**shared, "name": "near", "annotations": "data/pretrain.json", "contaminates": ["docvqa"]}
    folder = run(recipe(tmp_path / "both.yaml", kept, near), root)
    found = run_record.data(str(folder))
    assert found == {
        "manifest_sha256": sha256_of(folder / "manifest.json"),
        "recipe": "both",
        "records": 32,
        "contaminated": {"near": ["docvqa"]},
        "left_out_as_contaminated": [],
    }
    assert run_record.data(str(folder / "index.arrow")) == found
    folder = run(recipe(tmp_path / "clean.yaml", kept, near), root, "--exclude-contaminated")
    assert run_record.data(str(folder))["contaminated"] == {}
    assert run_record.data(str(folder))["left_out_as_contaminated"] == ["near"]
    values = json.loads((folder / "manifest.json").read_text())
    del values["recipe"]
    (folder / "manifest.json").write_text(json.dumps(values))
    found = run_record.data(str(folder))  # written by hand, say: no training ends for it
    assert (found["recipe"], found["manifest_sha256"]) == (None, sha256_of(folder / "manifest.json"))


def test_other_data_have_no_manifest(world, tmp_path):
    assert run_record.data(str(world.data / "sft.json")) is None
    (tmp_path / "manifest.json").write_text('{"kind": "shards"}')
    assert run_record.data(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text("{torn")
    assert run_record.data(str(tmp_path)) is None


def test_code_is_its_commit():
    root = Path(run_record.__file__).parents[2]
    found = run_record.code()
    if not (root / ".git").exists():
        assert found is None
        return
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert found["commit"] == head.stdout.strip()
    assert isinstance(found["changed"], bool)


def test_code_without_git_is_not_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_record.code() is None
