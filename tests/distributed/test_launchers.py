"""Each launcher starts two processes of the real script on this machine, and all compute the same."""

from __future__ import annotations

import json

import pytest

from tests.distributed.runs import run_script
from tests.train.runs import losses


@pytest.mark.parametrize(
    ("launcher", "config"),
    [
        ("deepspeed", "scripts/zero3.json"),
        pytest.param("deepspeed", "", marks=pytest.mark.slow),
        pytest.param("torchrun", "scripts/zero2.json", marks=pytest.mark.slow),
    ],
)
def test_two_processes_by_each_launcher(world, one_node, tmp_path, launcher, config):
    done = run_script(world, tmp_path / "out", LAUNCHER=launcher, DEEPSPEED=config)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses(tmp_path / "out") == pytest.approx(one_node, rel=1e-4)
    assert json.loads((tmp_path / "out" / "train_summary.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_users_mistake_keeps_its_exit_code(world, tmp_path, launcher):
    done = run_script(world, tmp_path / "out", "--learning_rat", "1", LAUNCHER=launcher)
    assert done.returncode == 2
    assert "unknown flag --learning_rat; did you mean --learning_rate" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_one_process_alone_gives_the_same(world, one_node, tmp_path):
    done = run_script(world, tmp_path / "out", LAUNCHER="python", NPROC="1", PER_DEVICE_BATCH="4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "out") == pytest.approx(one_node, rel=1e-4)
