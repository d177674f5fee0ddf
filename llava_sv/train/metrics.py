"""What a run measures: counts of the steps since the last log, OUTPUT/metrics.jsonl, OUTPUT/loss.png.

The trainer fills a `Window` at each forward and empties it at each log; `MetricsCallback` writes what is logged.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava_sv.files import replacing, write_text

FIELDS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "samples_per_second",
    "padding_share",
    "visual_tokens",
    "skipped_steps",
)
"""What a line of metrics.jsonl holds after `step` and `epoch`, and before `seconds`. A number that is not finite is
null; `skipped_steps` counts those that were dropped for it, from the run's beginning."""


class Window:
    """Counts over the steps since the last log, of this rank.

    tokens: positions that are not padding. padding: positions that are. visual_tokens: positions that came from images.
    """

    NAMES = ("tokens", "padding", "visual_tokens", "samples")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.counts = dict.fromkeys(self.NAMES, 0)
        self.started = time.perf_counter()

    def add(self, stats: dict[str, int], samples: int) -> None:
        """Count one forward: `stats` is the model's `last_splice_stats`."""
        for name in ("tokens", "padding", "visual_tokens"):
            self.counts[name] = self.counts[name] + int(stats[name])
        self.counts["samples"] += samples

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not training (saving a checkpoint)."""
        self.started += seconds

    def seconds(self) -> float:
        """Time since the last log, in seconds."""
        return max(time.perf_counter() - self.started, 1e-9)


def window_metrics(totals: dict[str, float], seconds: float, steps: int) -> dict[str, float]:
    """Rates and shares from `totals` (counts summed over all ranks) of `steps` optimizer steps in `seconds`."""
    positions = totals["tokens"] + totals["padding"]
    return {
        "tokens_per_second": totals["tokens"] / seconds,
        "samples_per_second": totals["samples"] / seconds,
        "padding_share": totals["padding"] / positions if positions else 0.0,
        "visual_tokens": totals["visual_tokens"] / max(steps, 1),
    }


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, as far as step `up_to`; a last line that a killed run left torn is passed over."""
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


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `path` by `rows`, in one step."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def draw_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss curve as a PNG: every logged step, and a running mean of 5% of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["loss"] is not None]
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    width = max(1, len(rows) // 20)
    means = [sum(losses[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(rows))]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, losses, color="#9ab", linewidth=0.8, label="logged")
    axes.plot(steps, means, color="#124", linewidth=1.6, label=f"mean of {width}")
    axes.set(xlabel="step", ylabel="loss", title="training loss")
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
        rows = read_metrics(self.path, up_to=state.global_step)
        self.seconds_before = rows[-1]["seconds"] if rows else 0.0
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_metrics(self.path, rows)

    def on_step_end(self, args, state, control, **kwargs):
        """A step that saves also logs."""
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line for a training step; the closing summary of a run has no line."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        row = {"step": state.global_step, "epoch": logs.get("epoch", state.epoch)}
        row.update({name: logs[name] if math.isfinite(logs[name]) else None for name in FIELDS if name in logs})
        row["seconds"] = round(self.seconds(), 3)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.failed = error

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the loss curve."""
        if state.is_world_process_zero:
            rows = read_metrics(self.path)
            if any(row["loss"] is not None for row in rows):
                try:
                    draw_loss(rows, self.path.with_name("loss.png"))
                except OSError as error:
                    self.failed = error
