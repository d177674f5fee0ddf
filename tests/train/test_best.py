"""The best checkpoint of a run: kept, named, exported and loaded; and training that stops without a better one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava_sv.errors import Stopped
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train import best, checkpoint, evaluation, stopping
from llava_sv.train.llava_trainer import LLaVATrainer
from llava_sv.train.metrics import read_metrics, read_rows
from llava_sv.train.train import train
from tests.train.runs import run

torch.set_num_threads(1)

STEPS = ("--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")


def summary_of(output):
    return json.loads((output / "train_summary.json").read_text())


def history(*values):
    return [{"step": 2 * i, "eval_loss": value} for i, value in enumerate(values, 1)]


def test_patience_counts_evaluations_without_a_better_one():
    patience = best.Patience(2, "loss", greater=False)
    assert [patience.waited(history(3, 2, 2.5, 2, 1.9)[:n]) for n in range(1, 6)] == [0, 0, 1, 2, 0]
    assert best.Patience(2, "eval_loss", greater=True).waited(history(3, 2, 4, 4)) == 1
    assert patience.waited(history(3, float("nan"), 2)) == 0, "what is no number is no evaluation"
    twice = [*history(3, 2), {"step": 4, "eval_loss": 2}]
    assert patience.waited(twice) == 0, "an evaluation made again after a resumption counts once"


def test_the_best_checkpoint_is_kept_named_exported_and_loaded(world, tmp_path, monkeypatch):
    """Validation losses as given: the second of four is best, and would be rotated away."""
    given = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", *STEPS, "--save_total_limit", "2", "--load_best_model_at_end", "True"]
    printed = run(world.flags("skip", tmp_path, *flags, "--export_best", "copy", "--max_steps", "8"))
    assert [folder.name for _, folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
    wanted = {"best_checkpoint": "checkpoint-4", "best_metric": 1.0, "best_step": 4, "best_metric_name": "eval_loss"}
    assert wanted.items() <= summary_of(tmp_path).items()
    assert "best checkpoint: " in printed
    state = [
        load_file(tmp_path / folder / "model.safetensors") for folder in (".", "checkpoint-4", "best", "checkpoint-8")
    ]
    assert all(torch.equal(state[0][name], other[name]) for other in state[1:3] for name in state[0])
    assert any(not torch.equal(state[0][name], state[3][name]) for name in state[0])
    assert not list((tmp_path / "best").glob("optimizer*"))
    load_pretrained_model(str(tmp_path / "best"), device="cpu")


def test_a_projectors_best_checkpoint_is_loaded_too(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", *STEPS, "--load_best_model_at_end", "True", "--max_steps", "4"]
    run(world.flags("pretrain", tmp_path, *flags, "--export_best", "link"))
    final, first, last = (
        load_file(tmp_path / folder / "mm_projector.safetensors") for folder in (".", "best", "checkpoint-4")
    )
    assert (tmp_path / "best").resolve().name == "checkpoint-2"
    assert all(torch.equal(final[name], first[name]) for name in final)
    assert any(not torch.equal(final[name], last[name]) for name in final)


def test_early_stopping_stops_and_saves(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", "--eval_steps", "1", "--early_stopping_patience", "2"]
    printed = run(world.flags("skip", tmp_path, *flags))
    assert "stopping at step 3: 2 evaluations in a row without a better eval_loss" in printed
    found = summary_of(tmp_path)
    assert (found["steps"], found["best_checkpoint"], found["best_metric"]) == (3, None, 1.0)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_step_that_may_save_the_best_also_logs(world, tmp_path):
    flags = ["--validation_split", "2", "--eval_steps", "2", "--save_strategy", "best", "--logging_steps", "100"]
    run(world.flags("skip", tmp_path, *flags, "--max_steps", "4"))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4]
    assert summary_of(tmp_path)["best_checkpoint"] is not None


def test_rotation_keeps_the_best_within_the_limit(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        checkpoint.mark_complete(tmp_path / f"checkpoint-{step}", step, 1)
    first, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-8"
    checkpoint.rotate(tmp_path, 3, keep=last, best=first)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 6, 8]
    checkpoint.rotate(tmp_path, 1, keep=last, best=first)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 8]
    checkpoint.rotate(tmp_path, 1, keep=last, best=last)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [8]


def test_adapters_that_were_best_are_loaded_too(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", *STEPS, "--load_best_model_at_end", "True", "--max_steps", "4"]
    run(world.flags("skip", tmp_path, *flags, "--lora_enable", "True", "--lora_r", "2", "--packing", "True"))
    for name in ("adapter_model", "non_lora_trainables"):
        final, first, last = (
            load_file(tmp_path / folder / f"{name}.safetensors") for folder in (".", "checkpoint-2", "checkpoint-4")
        )
        assert all(torch.equal(final[key], first[key]) for key in final)
        assert any(not torch.equal(final[key], last[key]) for key in final)


def asked_to_stop_at(step, monkeypatch):
    """SIGTERM during `step` of this process's run."""
    real = LLaVATrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            stopping.SIGNALS.received = "SIGTERM"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LLaVATrainer, "training_step", training_step)


def test_a_preempted_run_saves_whether_it_is_the_best_or_not(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", "--eval_steps", "2", "--save_strategy", "best", "--max_steps", "8"]
    with monkeypatch.context() as patch:
        asked_to_stop_at(4, patch)
        with pytest.raises(Stopped, match=r"saved .*checkpoint-4") as stopped:
            train(argv=world.flags("skip", tmp_path, *flags))
    assert stopped.value.code == 75
    assert checkpoint.last_complete_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / checkpoint.SUMMARY).exists()


def test_an_epochs_evaluation_is_made_up_for(world, tmp_path, monkeypatch):
    """Stopped after the last step of an epoch, which is saved and left before the epoch's evaluation."""
    flags = ["--validation_split", "4", "--eval_strategy", "epoch", "--num_train_epochs", "2"]
    run(world.flags("skip", tmp_path / "whole", *flags))
    with monkeypatch.context() as patch:
        asked_to_stop_at(6, patch)
        with pytest.raises(Stopped, match=r"saved .*checkpoint-6"):
            train(argv=world.flags("skip", tmp_path / "torn", *flags))
    run(world.flags("skip", tmp_path / "torn", *flags))
    rows, whole = (
        [(row["step"], row.get("loss"), row.get("eval_loss")) for row in read_rows(tmp_path / name / "metrics.jsonl")]
        for name in ("torn", "whole")
    )
    assert [step for step, _, value in whole if value is not None] == [6, 12]
    assert rows == whole
