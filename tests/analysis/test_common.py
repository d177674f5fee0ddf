"""What the commands share: pictures found and read one by one, files kept, written whole, and fit for JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_sv.analysis.common import DEFAULT_OUTPUT, Results, find_pictures, make_parser, open_job, plain
from llava_sv.analysis.plots import figure
from llava_sv.errors import UserError
from llava_sv.generation import find_device
from llava_sv.model.token_groups import TokenRole


def job_of(checkpoint, folder, *more):
    flags = ["--model-path", str(checkpoint), "--image-folder", str(folder), "--device", "cpu", *more]
    return open_job(make_parser("test", "", "").parse_args(flags))


def test_pictures_are_found_in_folders_of_any_depth_by_name(pictures):
    names = [str(path.relative_to(pictures)) for path in find_pictures(str(pictures))]
    assert names == ["a.png", "b.JPG", "c.webp", "deeper/d.png"]
    assert find_pictures(str(pictures), 2) == [pictures / "a.png", pictures / "b.JPG"]


def test_folders_without_pictures(tmp_path):
    with pytest.raises(UserError, match=r"--image-folder .*absent: no such folder"):
        find_pictures(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"--image-folder .*notes.txt: is a file; name the folder that it lies in"):
        find_pictures(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match=r"--image-folder .*: holds no pictures \(\.jpg, .*\); name another folder"):
        find_pictures(str(tmp_path))
    with pytest.raises(UserError, match=r"--num-images -1: must be 0 \(all\) or more"):
        find_pictures(str(tmp_path), -1)


def test_each_picture_comes_with_its_sequence(skip_checkpoint, pictures):
    job = job_of(skip_checkpoint, pictures, "--num-images", "3")
    samples = list(job.samples("reading"))
    assert [sample.name for sample in samples] == ["a.png", "b.JPG", "c.webp"]
    spliced = job.splice(samples[0])
    skip = job.model.config.skip_vision
    assert int((spliced.token_roles == TokenRole.SKIPPED).sum()) == skip.num_skipped
    assert spliced.inputs_embeds.shape[:2] == spliced.token_roles.shape
    facts = job.facts()
    assert facts["images"] == 3
    assert facts["skip_vision"]["num_retained"] == skip.num_retained
    json.dumps(facts, allow_nan=False)


def test_a_picture_that_cannot_be_read_is_passed_over_and_named(skip_checkpoint, pictures, tmp_path, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "b.JPG").write_bytes(b"no picture")
    job = job_of(skip_checkpoint, folder)
    assert [sample.name for sample in job.samples("reading")] == ["a.png", "c.webp", "deeper/d.png"]
    assert job.unreadable == ["b.JPG"]
    assert job.facts()["images"] == 3
    assert "passed over: " in capsys.readouterr().err
    for path in find_pictures(str(folder)):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its 4 pictures can be read"):
        list(job_of(skip_checkpoint, folder).samples("reading"))


def test_a_checkpoint_without_an_encoder(skip_checkpoint, pictures, monkeypatch):
    from llava_sv.generation import Assistant

    monkeypatch.setattr(Assistant, "has_vision", property(lambda self: False))
    with pytest.raises(UserError, match=r"--model-path .*: this checkpoint has no vision encoder; name one that has"):
        job_of(skip_checkpoint, pictures)


def test_the_precision_asked_for(skip_checkpoint, pictures):
    job = job_of(skip_checkpoint, pictures, "--dtype", "bf16")
    assert next(job.model.parameters()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="--dtype: unknown precision 'fp7'"):
        job_of(skip_checkpoint, pictures, "--dtype", "fp7")


def test_results_are_three_files_and_kept(tmp_path, capsys):
    results = Results(str(tmp_path / "out"), "thing")
    results.save({"x": np.arange(3)}, {"n": np.float32(2.0), "bad": float("nan")}, lambda: figure()[0])
    assert np.load(tmp_path / "out" / "thing.npz")["x"].tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "out" / "thing.json").read_text()) == {"n": 2.0, "bad": None}
    assert (tmp_path / "out" / "thing.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["thing.json", "thing.npz", "thing.png"]
    with pytest.raises(UserError, match=r"--output .*thing\.npz.* exists; name another folder, or --overwrite"):
        Results(str(tmp_path / "out"), "thing")
    Results(str(tmp_path / "out"), "thing", overwrite=True)
    assert (tmp_path / "out" / "thing.npz").exists()


def test_what_json_cannot_hold():
    value = {1: np.int64(3), "a": torch.ones(2), "b": (float("inf"), np.float64("nan"))}
    assert plain(value) == {"1": 3, "a": [1.0, 1.0], "b": [None, None]}


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("tpu", "--device tpu: unknown device; known: cpu, cuda, cuda:N"),
        ("meta", "--device meta: computes nothing; use cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_are_none(device, said, skip_checkpoint, pictures):
    with pytest.raises(UserError, match=said):
        job_of(skip_checkpoint, pictures, "--device", device)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:7: GPUs here are cuda:0 to cuda:1; name one"):
        find_device("cuda:7")


def test_what_runs_write_is_ignored_by_git():
    root = Path(__file__).parents[2]
    assert f"/{DEFAULT_OUTPUT}/" in (root / ".gitignore").read_text().splitlines()
