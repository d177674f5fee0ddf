"""Killed at any moment and run again, mixing and indexing end with the same bytes as undisturbed, and leave nothing
else behind. A run is a process group of its own, killed whole by SIGKILL."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
import traceback

import pytest

from llava_sv.data import mix
from llava_sv.data.index import open_index
from tests.data.mix_samples import many, recipe, source
from tests.data.samples import write_array

FEW, MANY = 3, 20


def finished(work, kill_after=None):
    """Run `work` in a process group of its own; whether it ended by itself before it was killed."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setsid()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):  # it may be gone, or have no group yet
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if kill_after is None:
        assert status == 0
    return status == 0


def sums(folder, names):
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


def files(folder):
    """Names of all files below, but for locks."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


@pytest.mark.parametrize("moments", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mix_killed_and_run_again(tmp_path, moments):
    root = tmp_path / "root"
    root.mkdir()
    lines = [{**source(root, name, many("ab" if name in "ab" else name, 800)), "take": 700} for name in "abcd"]
    path = recipe(tmp_path / "r.yaml", *lines)

    def work(output):
        return lambda: mix.main([str(path), "--root", str(root), "--output", str(output), "--workers", "2"])

    began = time.perf_counter()
    finished(work(tmp_path / "undisturbed"))
    seconds = time.perf_counter() - began
    wanted = sums(tmp_path / "undisturbed", ("index.arrow", "manifest.json", "problems.jsonl"))
    moment = random.Random(moments)
    killed = 0
    for number in range(moments):
        output = tmp_path / str(number)
        for _ in range(1 + number % 3):  # some are killed again while they go on
            killed += not finished(work(output), moment.uniform(0.05, 1) * seconds)
        finished(work(output))
        assert sums(output, ("index.arrow", "manifest.json", "problems.jsonl")) == wanted
        assert files(output) == files(tmp_path / "undisturbed")
    assert killed


@pytest.mark.parametrize("moments", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_index_killed_and_run_again(tmp_path, moments):
    path = write_array(tmp_path / "a.json", many("a", 6000))

    def work(cache):
        return lambda: open_index(path, cache)

    began = time.perf_counter()
    finished(work(tmp_path / "undisturbed"))
    seconds = time.perf_counter() - began
    (name,) = [name for name in files(tmp_path / "undisturbed") if name.endswith(".arrow")]
    wanted = sums(tmp_path / "undisturbed", [name])
    moment = random.Random(moments)
    killed = 0
    for number in range(moments):
        cache = tmp_path / str(number)
        killed += not finished(work(cache), moment.uniform(0.05, 1) * seconds)
        finished(work(cache))
        assert sums(cache, [name]) == wanted
        assert files(cache) == files(tmp_path / "undisturbed")
    assert killed
