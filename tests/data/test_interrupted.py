"""Ctrl-C, which a terminal sends to a command and all its processes: one line, exit code 130, no process and nothing
half-written left; and the same command goes on."""

from __future__ import annotations

import json
import os
import sys

import psutil
import pytest

from llava_sv import cli
from llava_sv.errors import INTERRUPTED
from tests.data.mix_samples import many, recipe, source
from tests.data.samples import with_image, write_array, write_images
from tests.train.runs import end_of, start

SCRIPT = """
import os, signal, sys, time
from llava_sv import cli
import {module} as module

def ctrl_c(*args, **kwargs):
    try:
        os.mkdir("{once}")
        os.killpg(0, signal.SIGINT)
    except FileExistsError:
        pass
    time.sleep(60)

{place} = ctrl_c
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def data(tmp_path):
    records = [with_image(number, question=f"<image>\nWhat is {number}?") for number in range(600)]
    return write_array(tmp_path / "data.json", records), write_images(tmp_path / "images", a=(32, 32))


def interrupted(tmp_path, module: str, place: str, argv) -> None:
    """Run the command; where it calls module.place, in whatever process, Ctrl-C is pressed."""
    script = SCRIPT.format(module=module, place=f"module.{place}", once=tmp_path / "pressed")
    process = start([sys.executable, "-c", script, *map(str, argv)])
    done = end_of(process, timeout=50)
    assert done.returncode == INTERRUPTED, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert lines == ["interrupted"], repr(done.stderr)
    _, alive = psutil.wait_procs([each for each in psutil.process_iter() if _of(each, process.pid)], timeout=10)
    assert not [each for each in alive if _of(each, process.pid)]


def _of(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.Error):
        return False


def hidden(folder) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.is_file() and path.name != ".lock"]


def test_mix(tmp_path):
    fields = [source(tmp_path, name, many(name, 5)) for name in ("a", "b", "c")]
    argv = ["data", "mix", recipe(tmp_path / "r.yaml", *fields), "--root", tmp_path, "--workers", "2"]
    interrupted(tmp_path, "llava_sv.data.mix_workers", "make_part", argv)
    assert hidden(tmp_path / "mixtures") == []
    assert cli.main([*map(str, argv)]) == 0
    assert json.loads((tmp_path / "mixtures" / "r" / "manifest.json").read_text())["records"] == 15


def test_shard(tmp_path, data):
    argv = ["data", "shard", data[0], "--image-folder", data[1], "--output", tmp_path / "out", "--workers", "2"]
    argv += ["--samples-per-shard", "100"]
    interrupted(tmp_path, "llava_sv.data.shard_pack", "_Writer._packed", argv)
    assert hidden(tmp_path / "out") == []
    assert cli.main([*map(str, argv), "--verify"]) == 0


def test_check(tmp_path, data):
    argv = ["data", "check", data[0], "--image-folder", data[1], "--workers", "2", "--fix", tmp_path / "clean.json"]
    interrupted(tmp_path, "llava_sv.data.check_images", "_Work.__call__", argv)
    assert hidden(tmp_path) == []
    assert not (tmp_path / "clean.json").exists()
    assert cli.main([*map(str, argv)]) == 0


def test_index(tmp_path, data):
    argv = ["data", "index", data[0], "--workers", "1", "--cache-dir", tmp_path / "cache"]
    interrupted(tmp_path, "llava_sv.data.index_build", "in_this_process", argv)
    assert cli.main([*map(str, argv)]) == 0
