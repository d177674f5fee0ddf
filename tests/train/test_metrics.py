"""metrics.jsonl and loss.png: what is counted, what is written, and that no step appears twice."""

import json
import math
from types import SimpleNamespace

import pytest
from PIL import Image

from llava_sv.train.metrics import MetricsCallback, Window, draw_loss, read_metrics, window_metrics


def test_rates_and_shares_by_hand():
    window = Window()
    window.add({"tokens": 30, "padding": 10, "visual_tokens": 12}, samples=2)
    window.add({"tokens": 50, "padding": 10, "visual_tokens": 18}, samples=2)
    assert window_metrics(window.counts, seconds=4.0, steps=2) == {
        "tokens_per_second": 20.0,
        "samples_per_second": 1.0,
        "padding_share": 0.2,
        "visual_tokens": 15.0,
    }
    window.reset()
    assert window_metrics(window.counts, 1.0, 1)["padding_share"] == 0.0


def test_saving_does_not_count_as_training_time():
    window = Window()
    window.exclude(-100.0)
    assert window.seconds() > 100
    window.exclude(100.0)
    assert window.seconds() < 1


def state(step, epoch=0.5):
    return SimpleNamespace(global_step=step, epoch=epoch, is_world_process_zero=True)


def log(callback, step, loss):
    logs = {"loss": loss, "learning_rate": 1e-3, "epoch": step / 10, "tokens_per_second": 5.0, "other": 1}
    callback.on_log(None, state(step), None, logs=logs)


def test_lines_and_the_truncation_on_resume(tmp_path):
    callback = MetricsCallback(tmp_path)
    callback.on_train_begin(None, state(0), None)
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
    resumed.on_train_begin(None, state(3), None)
    log(resumed, 4, 0.25)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert resumed.seconds() >= rows[2]["seconds"]


def test_a_step_that_saves_also_logs(tmp_path):
    control = SimpleNamespace(should_log=False, should_save=True)
    assert MetricsCallback(tmp_path).on_step_end(None, state(1), control).should_log
    control = SimpleNamespace(should_log=False, should_save=False)
    assert not MetricsCallback(tmp_path).on_step_end(None, state(1), control).should_log


@pytest.mark.parametrize("count", [1, 40])
def test_the_loss_curve_is_a_picture(tmp_path, count):
    draw_loss([{"step": i, "loss": math.exp(-i / 10)} for i in range(count)], tmp_path / "loss.png")
    picture = Image.open(tmp_path / "loss.png").convert("L")
    assert picture.size == (840, 480)
    assert len(set(picture.getdata())) > 5
