"""What a run measures: counts of the steps since the last log, OUTPUT/metrics.jsonl, OUTPUT/loss.png.

The trainer fills a `Window` at each forward and empties it at each log; `MetricsCallback` writes what is logged.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from llava_sv.files import replacing, write_text
from llava_sv.train.best import owed
from llava_sv.train.step_flops import ON_DEVICE, ON_HOST

FIELDS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "samples_per_second",
    "padding_share",
    "visual_tokens",
    "step_ms",
    "data_wait_ms",
    "data_wait_share",
    "data_wait_share_mean",
    "flops_per_second",
    "mfu",
    "hfu",
    "dense_flops_share",
    "skipped_steps",
)
"""What a training step's line of metrics.jsonl holds after `step` and `epoch`, and before `seconds`. A number that is
not finite is null; `skipped_steps` counts those that were dropped for it, from the run's beginning."""

EVALUATED = "eval_"
"""How the fields of an evaluation's line begin; it stands beside the line of the same step."""


class Window:
    """Counts over the steps since the last log, of this rank: `step_flops.ON_HOST` and `ON_DEVICE`.

    What only the device knows stays there, as a sum in whole numbers, until `totals` asks: no step waits for it.
    """

    NAMES = (*ON_HOST, *ON_DEVICE)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.counts: dict[str, float] = dict.fromkeys(ON_HOST, 0.0)
        self.waited = 0.0
        """Seconds spent waiting for data."""
        self._on_device: Tensor | None = None
        self.started = time.perf_counter()

    def add(self, counts: dict[str, float], on_device: Tensor) -> None:
        """Count one forward: `ON_HOST` as numbers, `ON_DEVICE` as an int64 tensor."""
        for name, value in counts.items():
            self.counts[name] += value
        self._on_device = on_device if self._on_device is None else self._on_device + on_device

    def wait(self, seconds: float) -> None:
        """Time that was spent waiting for data."""
        self.waited += seconds

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not training (saving a checkpoint, evaluating)."""
        self.started += seconds

    def seconds(self) -> float:
        """Time since the last log, in seconds."""
        return max(time.perf_counter() - self.started, 1e-9)

    def totals(self) -> dict[str, float]:
        """All counts, by name."""
        device = [0] * len(ON_DEVICE) if self._on_device is None else self._on_device.tolist()
        return self.counts | dict(zip(ON_DEVICE, map(float, device)))


def window_metrics(totals: dict[str, float], seconds: float, steps: int) -> dict[str, float]:
    """Rates and shares from `totals` (counts summed over all ranks) of `steps` optimizer steps in `seconds`."""
    positions = totals["positions"]
    return {
        "tokens_per_second": totals["tokens"] / seconds,
        "samples_per_second": totals["samples"] / seconds,
        "padding_share": 1 - totals["tokens"] / positions if positions else 0.0,
        "visual_tokens": totals["visual_tokens"] / max(steps, 1),
    }


def read_rows(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl, evaluations' too, as far as step `up_to`; a last line that a killed run left torn
    is passed over."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if up_to is None or row["step"] <= up_to:
            rows.append(row)
    return rows


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The training steps among `read_rows`: each has `loss`."""
    return [row for row in read_rows(path, up_to) if "loss" in row]


def read_evaluations(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The evaluations among `read_rows`: each has fields that begin with `eval_`."""
    return [row for row in read_rows(path, up_to) if any(name.startswith(EVALUATED) for name in row)]


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `path` by `rows`, in one step."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def draw_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss curve as a PNG: every logged step, a running mean of 5% of them, and the validation loss where there is
    one. rows: as `read_rows` gives them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = [row for row in rows if row.get("loss") is not None]
    evaluated = [row for row in rows if row.get("eval_loss") is not None]
    losses = [row["loss"] for row in trained]
    width = max(1, len(trained) // 20)
    means = [sum(losses[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(trained))]
    steps = [row["step"] for row in trained]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, losses, color="#9ab", linewidth=0.8, label="logged")
    axes.plot(steps, means, color="#124", linewidth=1.6, label=f"mean of {width}")
    if evaluated:
        places, values = [row["step"] for row in evaluated], [row["eval_loss"] for row in evaluated]
        axes.plot(places, values, color="#c52", linewidth=1.6, marker="o", markersize=4, label="validation")
    title = "training and validation loss" if evaluated else "training loss"
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


class MetricsCallback(TrainerCallback):
    """Writes one JSON object a logged step to `output`/metrics.jsonl, and draws the loss at the end.

    When a run resumes, lines past the resumed step are dropped first, so that no step appears twice. A step that saves
    also logs: the losses between two saves are then the same whether or not the run was interrupted.
    """

    def __init__(self, output: str | Path) -> None:
        self.path = Path(output) / "metrics.jsonl"
        self.failed: OSError | None = None
        """What kept a line from being written; the ranks then stop together (`faults`)."""
        self.seconds_before = 0.0
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.seconds_before + time.perf_counter() - self.began

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the lines up to the step that training goes on from."""
        self.began = time.perf_counter()
        rows = read_rows(self.path, up_to=state.global_step)
        if owed(args, state):  # the evaluation will be made anew
            rows = [row for row in rows if "loss" in row or row["step"] < state.global_step]
        self.seconds_before = rows[-1]["seconds"] if rows else 0.0
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_metrics(self.path, rows)

    def on_step_end(self, args, state, control, **kwargs):
        """A step that saves also logs, and so does one whose evaluation may save."""
        may_save = control.should_evaluate and args.save_strategy == "best"
        control.should_log = control.should_log or control.should_save or may_save
        return control

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line for a training step or an evaluation; the closing summary of a run has no line."""
        logs = logs or {}
        names = FIELDS if "loss" in logs else [name for name in logs if name.startswith(EVALUATED)]
        if not state.is_world_process_zero or not names:
            return
        row = {"step": state.global_step, "epoch": logs.get("epoch", state.epoch)}
        row.update({name: logs[name] if math.isfinite(logs[name]) else None for name in names if name in logs})
        row["seconds"] = round(self.seconds(), 3)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.failed = error

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the loss curve."""
        if state.is_world_process_zero:
            rows = read_rows(self.path)
            if any(row.get("loss") is not None for row in rows):
                try:
                    draw_loss(rows, self.path.with_name("loss.png"))
                except OSError as error:
                    self.failed = error
