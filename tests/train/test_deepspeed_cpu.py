"""ZeRO-1, -2 and -3 on CPU through the real entry: the same losses as plain training, and an exact resumption."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llava_sv.model.builder import load_pretrained_model
from llava_sv.train.metrics import read_metrics
from tests.train import zero_worker


def train(flags, launcher=()):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, *launcher, "llava_sv/train/train_mem.py", *flags],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done


def losses(output):
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def plain(mixed_flags, tmp_path_factory):
    """Losses of one process without DeepSpeed."""
    output = tmp_path_factory.mktemp("plain")
    assert zero_worker.run_job(mixed_flags(output, "--per_device_train_batch_size", "4"))["code"] == 0
    return losses(output)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_agree_with_one(two_processes, plain, stage):
    """Batch 4 in one process, and 2 x 2: the same samples, the same mean over supervised tokens, the same losses.

    All is float32: the same sums in another order.
    """
    output = two_processes[stage]
    assert len(plain) == 6
    assert losses(output) == pytest.approx(plain, rel=1e-6)
    assert json.loads((output / "train_summary.json").read_text())["world_size"] == 2
    load_pretrained_model(str(output), device="cpu")


def test_without_use_cpu_two_processes_are_refused_instead_of_training_twice(world, tmp_path):
    flags = world.flags("skip", tmp_path, "--max_steps", "1", "--use_cpu", "False")
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    code = (
        "import sys; from types import SimpleNamespace; from llava_sv.train.distributed import check_world; "
        "from llava_sv.errors import exit_on_user_error; "
        "sys.exit(exit_on_user_error(check_world, SimpleNamespace(world_size=1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "2 processes were launched, and training sees 1" in done.stderr


@pytest.mark.slow
def test_zero2_pretraining_resumes_exactly(world, tmp_path):
    flags = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2", "--deepspeed", "scripts/zero2.json"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert train(world.flags("pretrain", whole, *flags)).returncode == 0
    shutil.copytree(whole, torn)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(torn / name)
    (torn / "train_summary.json").unlink()
    assert train(world.flags("pretrain", torn, *flags)).returncode == 0
    assert losses(torn) == losses(whole)
    assert (torn / "mm_projector.safetensors").read_bytes() == (whole / "mm_projector.safetensors").read_bytes()
