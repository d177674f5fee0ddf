"""metrics.jsonl and loss.png: what is counted, what is written, and that no step appears twice."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava_sv.train.metrics import (
    MetricsCallback,
    Window,
    draw_loss,
    read_evaluations,
    read_metrics,
    read_rows,
    window_metrics,
)
from llava_sv.train.step_flops import ON_HOST


def counts(samples, positions):
    return dict.fromkeys(ON_HOST, 0.0) | {"samples": samples, "positions": positions}


def test_rates_and_shares_by_hand():
    window = Window()
    window.add(counts(2, 40), torch.tensor([30, 12, 0, 450]))
    window.add(counts(2, 60), torch.tensor([50, 18, 0, 1250]))
    totals = window.totals()
    assert (totals["squares"], totals["visual_tokens"]) == (1700, 30)
    assert window_metrics(totals, seconds=4.0, steps=2) == pytest.approx(
        {"tokens_per_second": 20.0, "samples_per_second": 1.0, "padding_share": 0.2, "visual_tokens": 15.0}
    )
    window.wait(0.5)
    window.reset()
    assert window.waited == 0
    assert window_metrics(window.totals(), 1.0, 1)["padding_share"] == 0.0


def test_sums_stay_whole_numbers_on_the_device():
    """Beyond what float32 holds exactly."""
    window = Window()
    for _ in range(3):
        window.add(counts(1, 1), torch.tensor([2**25 + 1, 0, 0, 0]))
    assert window.totals()["tokens"] == 3 * (2**25 + 1)


def test_saving_does_not_count_as_training_time():
    window = Window()
    window.exclude(-100.0)
    assert window.seconds() > 100
    window.exclude(100.0)
    assert window.seconds() < 1


ARGS = SimpleNamespace(eval_strategy="no")


def state(step, epoch=0.5):
    return SimpleNamespace(global_step=step, epoch=epoch, is_world_process_zero=True)


def log(callback, step, loss):
    logs = {"loss": loss, "learning_rate": 1e-3, "epoch": step / 10, "tokens_per_second": 5.0, "other": 1}
    callback.on_log(None, state(step), None, logs=logs)


def test_lines_and_the_truncation_on_resume(tmp_path):
    callback = MetricsCallback(tmp_path)
    callback.on_train_begin(ARGS, state(0), None)
    for step in range(1, 6):
        log(callback, step, 1 / step)
    callback.on_log(None, state(5), None, logs={"train_loss": 0.4})  # the closing summary is no step
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert list(rows[0]) == ["step", "epoch", "loss", "learning_rate", "tokens_per_second", "seconds"]

    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # as a killed process leaves it
    resumed = MetricsCallback(tmp_path)
    resumed.on_train_begin(ARGS, state(3), None)
    log(resumed, 4, 0.25)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert resumed.seconds() >= rows[2]["seconds"]


def test_evaluations_have_lines_of_their_own_and_are_dropped_with_their_steps(tmp_path):
    callback = MetricsCallback(tmp_path)
    callback.on_train_begin(ARGS, state(0), None)
    for step in (1, 2):
        log(callback, step, 1.0)
        callback.on_log(None, state(step), None, logs={"eval_loss": 0.5 * step, "eval_accuracy": 0.25, "epoch": 0.1})
    path = tmp_path / "metrics.jsonl"
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 1.0]
    assert [(row["step"], row["eval_loss"], row["eval_accuracy"]) for row in read_evaluations(path)] == [
        (1, 0.5, 0.25),
        (2, 1.0, 0.25),
    ]
    MetricsCallback(tmp_path).on_train_begin(ARGS, state(1), None)
    assert [("loss" in row, row["step"]) for row in read_rows(path)] == [(True, 1), (False, 1)]


@pytest.mark.parametrize(
    ("saves", "evaluates", "strategy", "logs"),
    [
        (True, False, "steps", True),
        (False, False, "steps", False),
        (False, True, "steps", False),
        (False, True, "best", True),
    ],
)
def test_a_step_that_saves_also_logs(tmp_path, saves, evaluates, strategy, logs):
    control = SimpleNamespace(should_log=False, should_save=saves, should_evaluate=evaluates)
    args = SimpleNamespace(save_strategy=strategy)
    assert MetricsCallback(tmp_path).on_step_end(args, state(1), control).should_log is logs


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("evaluated", [False, True])
def test_the_loss_curve_is_a_picture(tmp_path, count, evaluated):
    rows = [{"step": i, "loss": math.exp(-i / 10)} for i in range(count)]
    rows += [{"step": i, "eval_loss": 0.2 + math.exp(-i / 12)} for i in range(0, count, 5)] if evaluated else []
    rows.append({"step": count, "eval_accuracy": 0.5})
    draw_loss(rows, tmp_path / "loss.png")
    picture = Image.open(tmp_path / "loss.png").convert("RGB")
    assert picture.size == (840, 480)
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert len(colours) > 5
    assert ((0xCC, 0x55, 0x22) in colours) is evaluated, "the validation curve's colour"
