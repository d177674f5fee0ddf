"""ZeRO-2 and ZeRO-3 on CPU through the real entry: the same losses as plain training, and an exact resumption."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llava_sv.model.builder import load_pretrained_model
from llava_sv.train.metrics import read_metrics


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
def plain(world, tmp_path_factory):
    """Losses of four steps without DeepSpeed."""
    output = tmp_path_factory.mktemp("plain")
    done = train(world.flags("skip", output, "--max_steps", "4"))
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(output)


def test_zero2_in_one_process_gives_the_same_losses(world, plain, tmp_path):
    done = train(world.flags("skip", tmp_path, "--max_steps", "4", "--deepspeed", "scripts/zero2.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-5)
    load_pretrained_model(str(tmp_path), device="cpu")


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


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_processes_agree_with_one(world, tmp_path, zero):
    """Batch 4 in one process, and 2 x 2: the same samples, the same mean over supervised tokens, the same losses."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--max_steps", "4", "--group_by_modality_length", "True"]
    alone = train(world.flags("skip", one, *common, "--per_device_train_batch_size", "4"))
    assert alone.returncode == 0, alone.stderr[-3000:]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    zero_flags = ["--deepspeed", f"scripts/{zero}.json", "--gradient_checkpointing", "True"]
    both = train(world.flags("skip", two, *common, *zero_flags), launcher)
    assert both.returncode == 0, both.stderr[-3000:]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert json.loads((two / "train_summary.json").read_text())["world_size"] == 2
    load_pretrained_model(str(two), device="cpu")
