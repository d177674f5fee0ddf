"""A command line to the three argument objects: old flag names are translated, mistakes become one line.

Called by `train.train`. Nothing is read from disk here. `python -m llava_sv.train.flags FLAGS` only looks for mistakes.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Collection
from typing import NoReturn

from transformers import HfArgumentParser

from llava_sv.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_sv.errors import UserError, exit_on_user_error

EXAMPLE = """example (scripts/v1_5/*.sh write such commands for you):
  llava-sv train --model_name_or_path playground/tiny/llm --vision_tower playground/tiny/clip --version plain \\
      --data_path playground/data/toy/pretrain.json --image_folder playground/data/toy/images \\
      --tune_mm_mlp_adapter True --learning_rate 1e-3 --output_dir checkpoints/projector --use_cpu True"""

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
"""Flags of older transformers, and the names they go by now; `warmup_steps` below 1 is a share of all steps."""

DROPPED = {
    "save_safetensors": "weights are always saved as safetensors",
    "mm_patch_merge_type": "an image has one view here",
    "mpt_attn_impl": "there are no MPT models here",
    "half_precision_backend": "there is one backend",
    "fp16_opt_level": "there is one backend",
    "fp16_backend": "there is one backend",
    "use_mps_device": "the device is found by itself",
    "jit_mode_eval": "the model is evaluated as it trains",
    "prediction_loss_only": "evaluation gives the loss, and a benchmark's accuracy, in any case",
    "dispatch_batches": "each process reads its own batches",
}
"""Flags that older scripts pass and that change nothing here, and why."""


class Parser(HfArgumentParser):
    """HfArgumentParser whose mistakes are a `UserError` of one line, and whose flags may not be abbreviated."""

    def __init__(self) -> None:
        super().__init__(
            (ModelArguments, DataArguments, TrainingArguments),  # type: ignore[arg-type]
            prog="llava-sv train",
            description="Train: projector pretraining or supervised fine-tuning, dense or skipping.",
            epilog=EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _words(argv: list[str]) -> list[tuple[str, list[str]]]:
    """(flag name with `_`, its values as written) for each flag; `--name=value` is split."""
    words: list[tuple[str, list[str]]] = []
    for word in ("--help" if word == "-h" else word for word in argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            words.append((name.replace("-", "_"), [value] if equals else []))
        elif words:
            words[-1][1].append(word)
        else:
            raise UserError(f"unexpected {word!r} before the first flag; see --help")
    return words


def without(argv: list[str], names: Collection[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(the command line without the flags `names`, {name: the values of its last occurrence} of those found).

    Names have `_` and no dashes; the command line may write `-`, and `--name=value`.
    """
    kept: list[str] = []
    taken: dict[str, list[str]] = {}
    into = kept
    for word in argv:
        name, equals, value = word[2:].partition("=") if word.startswith("--") else ("", "", "")
        if name.replace("-", "_") in names:
            into = taken[name.replace("-", "_")] = [value] if equals else []
            continue
        into = kept if word.startswith("--") else into
        into.append(word)
    return kept, taken


def translate(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the command line in today's names, one note for each flag that was translated or left out)."""
    out: list[str] = []
    notes: list[str] = []
    for name, values in _words(argv):
        if name in DROPPED:
            notes.append(f"--{name}: left out ({DROPPED[name]})")
        elif name == "logging_dir":
            os.environ["TENSORBOARD_LOGGING_DIR"] = values[0] if values else ""
            notes.append("--logging_dir: set as TENSORBOARD_LOGGING_DIR")
        elif name == "group_by_length":
            out += ["--train_sampling_strategy", "group_by_length" if not values or _truth(values[0]) else "random"]
            notes.append("--group_by_length: now --train_sampling_strategy group_by_length")
        else:
            if name in RENAMED:
                notes.append(f"--{name}: now --{RENAMED[name]}")
            out += [f"--{RENAMED.get(name, name)}", *values]
    return out, notes


def _truth(text: str) -> bool:
    return text.lower() in ("true", "yes", "y", "t", "1")


def known_flags() -> list[str]:
    """Every flag's name, without dashes."""
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    return [item.name for kind in kinds for item in dataclasses.fields(kind) if item.init]


def check_known(argv: list[str]) -> None:
    """`UserError` for a flag that training does not have, with those that are nearly called so."""
    known = known_flags()
    accepted = {*known, *(f"no_{name}" for name in known), "help"}
    for name, _ in _words(argv):
        if name not in accepted:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean --{' or --'.join(near)}?" if near else "see --help"
            raise UserError(f"unknown flag --{name}; {hint}")


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments of a command line; `UserError` for a flag or value that is not known. Prints notes on old names."""
    argv, notes = translate(argv)
    check_known(argv)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    try:
        model, data, training = Parser().parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error).strip().replace("\n", " ")) from error
    return model, data, training


def check(argv: list[str]) -> None:
    """`UserError` for flags and words that `parse` would refuse, as far as they show apart from the others: some flags
    of a command line are enough, and no device is looked for."""
    argv, _ = translate(argv)
    check_known(argv)
    Parser().parse_args(argv)


if __name__ == "__main__":
    sys.exit(exit_on_user_error(check, sys.argv[1:]))
