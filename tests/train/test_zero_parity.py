"""ZeRO-1, -2 and -3 on two processes give the losses of one process without DeepSpeed, for every family; and they do so
only because a batch without images runs the encoder too.

Records are mixed: texts, pictures of different numbers of tiles, and batches in which one process has texts alone.
Skipping and gradient checkpointing are on.
"""

import json
import subprocess

import pytest
import torch

from llava_sv.model.builder import load_pretrained_model
from llava_sv.train.metrics import read_metrics
from tests.train import ranks, zero_worker
from tests.train.tiny import SKIPPING

STAGES = (1, 2, 3)
TOLERANCE = 1e-6
"""Relative. All is float32, where a rounding is 6e-8: two processes add the same numbers in another order."""


def flags(world, data, output, family, *extra):
    return world.flags(
        *("sft", output, "--data_path", str(data), "--max_steps", "6", "--learning_rate", "5e-3"),
        *("--weight_decay", "0.1", "--mm_projector_lr", "1e-2", *SKIPPING[family], *extra),
    )


def measured(output):
    return {name: [row[name] for row in read_metrics(output / "metrics.jsonl")] for name in ("loss", "grad_norm")}


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    return ranks.mixed_records(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def runs(world, mixed, tmp_path_factory):
    """(folder with an OUTPUT for each run, {run: what each process saw in each step}); `llava-0` is the plain run."""
    folder = tmp_path_factory.mktemp("parity")
    images = ("--image_folder", str(mixed.parent / "images"))
    seen, jobs = {}, []
    for family in SKIPPING:
        argv = flags(world, mixed, folder / f"{family}-0", family, *images, "--per_device_train_batch_size", "4")
        alone = zero_worker.run_job(argv)
        assert alone["code"] == 0
        seen[f"{family}-0"] = [alone]
        for stage in STAGES:
            name = f"{family}-{stage}"
            zero = ("--deepspeed", f"scripts/zero{stage}.json", "--gradient_checkpointing", "True")
            jobs.append({"name": name, "argv": flags(world, mixed, folder / name, family, *images, *zero)})
    return folder, seen | ranks.run_jobs(folder / "jobs", jobs)


@pytest.mark.parametrize("family", SKIPPING)
@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_of_one_process(runs, family, stage):
    folder, seen = runs
    alone, both = measured(folder / f"{family}-0"), measured(folder / f"{family}-{stage}")
    assert len(alone["loss"]) == 6
    assert alone["loss"][-1] < alone["loss"][0] - 0.3, "the weights must move, or nothing is shown"
    assert both["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)
    # what is clipped and logged is a sum of squares over all parameters: its rounding adds up
    assert both["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    ((one,), two) = seen[f"{family}-0"], seen[f"{family}-{stage}"]
    for step, batch in enumerate(one["seen"]):
        rows = [row for rank in two for row in rank["seen"][step]["rows"]]
        assert sorted(rows) == sorted(batch["rows"]), f"step {step} saw other samples"


@pytest.mark.parametrize("family", SKIPPING)
def test_the_batches_are_as_unequal_as_claimed(runs, family):
    """A step with a process of texts alone, and one with other numbers of images, or of tiles, on each."""
    _, seen = runs
    steps = list(zip(*([batch["views"] for batch in rank["seen"]] for rank in seen[f"{family}-3"])))
    assert any((not a and b) or (not b and a) for a, b in steps)
    assert any(len(a) != len(b) for a, b in steps)
    assert any(a and b and sum(a) != sum(b) for a, b in steps) or family != "llava_hd"


@pytest.mark.parametrize("family", SKIPPING)
@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_weights_are_those_of_one_process(runs, family, stage):
    """Gathered safetensors, whole and loadable; bounds are those of Adam's own division by a small root."""
    folder, _ = runs
    alone, both = (
        load_pretrained_model(str(folder / f"{family}-{which}"), device="cpu")[1].state_dict() for which in (0, stage)
    )
    assert alone.keys() == both.keys()
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_without_the_dummy_image_a_text_batch_stops_all(world, mixed, tmp_path, stage):
    """The guard of the tests above: they can fail. The worker ends itself where processes wait for each other."""
    images = ("--image_folder", str(mixed.parent / "images"))
    zero = ("--deepspeed", f"scripts/zero{stage}.json")
    argv = flags(world, mixed, tmp_path / "out", "llava", *images, *zero)
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)):
        ranks.run_jobs(tmp_path / "jobs", [{"name": "job", "argv": argv, "anchor": False}], timeout=120)
    begun = [json.loads((tmp_path / "jobs" / f"job.{rank}.begun.json").read_text()) for rank in range(2)]
    assert all(step["views"] for rank in begun for step in rank[:-1]), "batches with images run"
    assert [bool(rank[-1]["views"]) for rank in begun].count(False) == 1, "it stops where one process has texts alone"
