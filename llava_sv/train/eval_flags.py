"""What the flags of evaluation mean together: called by `arguments.TrainingArguments`, before transformers' own checks.

Nothing is read from disk here; `train.evaluation` does that.
"""

from __future__ import annotations

from typing import Any

from llava_sv.data.split import check_split
from llava_sv.errors import UserError

AUTO = "auto"
EXPORTS = ("no", "link", "copy")
SOURCES = ("--eval_data_path", "--validation_split", "--eval_benchmark")


def evaluates(args: Any) -> bool:
    """Whether there is anything to evaluate."""
    return bool(args.eval_data_path or args.validation_split or args.eval_benchmark)


def resolve(args: Any) -> None:
    """Fill in when to evaluate and by what the best is chosen; `UserError` for flags that contradict each other."""
    args.validation_split = check_split(args.validation_split)
    if args.eval_data_path and args.validation_split:
        raise UserError("--eval_data_path and --validation_split both name validation data: drop one")
    if args.eval_benchmark_limit is not None and args.eval_benchmark_limit < 1:
        raise UserError(f"--eval_benchmark_limit: expected 1 or more, got {args.eval_benchmark_limit}")
    if args.export_best not in EXPORTS:
        raise UserError(f"--export_best: unknown value {args.export_best!r}; known: {', '.join(EXPORTS)}")
    if args.early_stopping_patience is not None and args.early_stopping_patience < 1:
        raise UserError(f"--early_stopping_patience: expected 1 or more, got {args.early_stopping_patience}")
    _resolve_when(args)
    if evaluates(args):
        _resolve_metric(args)
        return
    for flag, given in (
        ("--early_stopping_patience", args.early_stopping_patience is not None),
        ("--export_best", args.export_best != "no"),
        ("--load_best_model_at_end", args.load_best_model_at_end),
    ):
        if given:
            raise UserError(f"{flag} needs an evaluation to go by: add {_one_of()}, or drop it")


def _one_of() -> str:
    return f"{', '.join(SOURCES[:-1])} or {SOURCES[-1]}"


def _resolve_when(args: Any) -> None:
    said = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    save = str(getattr(args.save_strategy, "value", args.save_strategy))
    if said == AUTO:
        args.eval_strategy = _when(args, save) if evaluates(args) else "no"
    elif said == "no" and evaluates(args):
        raise UserError(
            f"--eval_strategy no: nothing would be evaluated; say steps or epoch, leave it out, or drop {_one_of()}"
        )
    elif said != "no" and not evaluates(args):
        raise UserError(f"--eval_strategy {said}: there is nothing to evaluate; add {_one_of()}, or drop it")
    if args.export_best != "no" and save == "no" and evaluates(args):
        raise UserError("--export_best: no checkpoints are saved with --save_strategy no; say steps, epoch or best")


def _when(args: Any, save: str) -> str:
    """`--eval_steps` says steps; the best model at the end needs what saving does; else every epoch."""
    if args.eval_steps:
        return "steps"
    if args.load_best_model_at_end and save in ("steps", "epoch"):
        args.eval_steps = args.save_steps if save == "steps" else args.eval_steps
        return save
    return "epoch"


def _resolve_metric(args: Any) -> None:
    data = bool(args.eval_data_path or args.validation_split)
    if args.metric_for_best_model is None:
        args.metric_for_best_model = "loss" if data else "accuracy"
    name = args.metric_for_best_model.removeprefix("eval_")
    known = [*(["loss"] if data else []), *(["accuracy", "accuracy_CATEGORY"] if args.eval_benchmark else [])]
    if name not in known and not (args.eval_benchmark and name.startswith("accuracy_")):
        raise UserError(
            f"--metric_for_best_model {args.metric_for_best_model}: not among what is evaluated: {', '.join(known)}"
        )


def best_by(args: Any) -> str:
    """The metric that the best checkpoint is chosen by, in words."""
    name = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    return f"{name}, {'highest' if args.greater_is_better else 'lowest'}"
