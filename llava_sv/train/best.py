"""The best checkpoint by an evaluation: which it is, when to stop waiting for a better one, and its export.

Read from the trainer's own history, so that an interrupted run goes on as if it had not been. The trainer keeps the
best from rotation; `train.finish` names it in train_summary.json.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava_sv.train import checkpoint

FOLDER = "best"
"""Beside the checkpoints, where `--export_best` asks for it."""

TRAINING_STATE = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest", "zero_to_fp32.py")
"""Files of a checkpoint that only a resumption needs: a copy goes without."""


def evaluations(history: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """(step, value) of each evaluation of `metric` in a trainer's log history, by step; of one made twice, the last.

    A value that is no number counts as none.
    """
    name = "eval_" + metric.removeprefix("eval_")
    found = {entry["step"]: entry[name] for entry in history if name in entry}
    return [(step, value) for step, value in sorted(found.items()) if math.isfinite(value)]


def owed(args: Any, state: Any) -> bool:
    """Whether an epoch's evaluation is missing at the step that a run goes on from: its last step was saved, and the
    run ended before it was evaluated."""
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "epoch" or not state.global_step:
        return False
    known = any(entry["step"] == state.global_step and any(map(_is_evaluated, entry)) for entry in state.log_history)
    return not known and state.epoch >= args.eval_delay and abs(state.epoch - round(state.epoch)) < 1e-6


def _is_evaluated(name: str) -> bool:
    return name.startswith("eval_")


def best_of(values: list[tuple[int, float]], greater: bool) -> tuple[int, float] | None:
    """The first (step, value) that no other beats."""
    return max(values, key=lambda item: (item[1] if greater else -item[1], -item[0]), default=None)


def best_checkpoint(output: Path, args: Any, history: list[dict[str, Any]]) -> Path | None:
    """The complete checkpoint in `output` whose step was evaluated best."""
    if not args.metric_for_best_model:
        return None
    saved = dict(checkpoint.checkpoints(output))
    there = [
        (step, value)
        for step, value in evaluations(history, args.metric_for_best_model)
        if step in saved and checkpoint.what_is_torn(saved[step]) is None
    ]
    best = best_of(there, bool(args.greater_is_better))
    return None if best is None else saved[best[0]]


class Patience(TrainerCallback):
    """Stops training after `patience` evaluations in a row that were no better than the best before them.

    An improvement counts from `threshold` on.
    """

    def __init__(self, patience: int, metric: str, greater: bool, threshold: float = 0.0) -> None:
        self.patience, self.metric, self.greater, self.threshold = patience, metric, greater, threshold

    def waited(self, history: list[dict[str, Any]]) -> int:
        """Evaluations since the last improvement."""
        best, count = None, 0
        for _, value in evaluations(history, self.metric):
            gain = math.inf if best is None else (value - best if self.greater else best - value)
            count = 0 if gain > self.threshold else count + 1
            best = value if gain > self.threshold else best
        return count

    def on_evaluate(self, args, state, control, **kwargs):
        """Called on every rank, all of which hold the same history."""
        if self.waited(state.log_history) >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(
                    f"stopping at step {state.global_step:,}: {self.patience} evaluations in a row without a better "
                    f"eval_{self.metric.removeprefix('eval_')}",
                    flush=True,
                )
        return control


def summary(args: Any, state: Any, output: Path) -> dict[str, Any]:
    """`best_checkpoint` (its folder's name, None where none was saved), `best_metric`, `best_metric_name`, `best_step`:
    of the best checkpoint, or, where no evaluated step was saved, of the best evaluation. Empty without evaluations."""
    values = evaluations(state.log_history, args.metric_for_best_model) if args.metric_for_best_model else []
    if not values:
        return {}
    kept = best_checkpoint(output, args, state.log_history)
    wanted = [item for item in values if kept is None or kept.name == f"checkpoint-{item[0]}"]
    best = best_of(wanted, bool(args.greater_is_better))
    assert best is not None
    return {
        "best_checkpoint": None if kept is None else kept.name,
        "best_metric": best[1],
        "best_metric_name": "eval_" + args.metric_for_best_model.removeprefix("eval_"),
        "best_step": best[0],
    }


def forget(output: Path) -> None:
    """Remove an earlier export."""
    target = output / FOLDER
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)


def export(output: Path, best: Path, how: str) -> Path:
    """OUTPUT/best: a relative link to the checkpoint, or a copy of it without what only a resumption needs."""
    target = output / FOLDER
    if how == "link":
        forget(output)
        os.symlink(best.name, target, target_is_directory=True)
        return target
    half = output / f".{FOLDER}.copying"
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(best, half, ignore=shutil.ignore_patterns(*TRAINING_STATE, checkpoint.MARKER))
    forget(output)
    half.rename(target)
    return target
