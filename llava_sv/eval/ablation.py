"""Rows of an ablation, trained and scored: a list of rows and seeds in, ablation.json, ablation.md, ablation.png out.

`scripts/ablation.sh` calls `main`. Per seed: one pretraining, one fine-tuning for each distinct set of switches, one
evaluation for each row of its own. A finished step leaves a mark and is passed over; the rest goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.eval.ablation_report import write_report
from llava_sv.eval.ablation_rows import FAMILIES, Row, choose_rows
from llava_sv.eval.ablation_steps import Marks, Step, execute, resolve, training_flags
from llava_sv.eval.cli import build_parser as eval_parser
from llava_sv.eval.tasks import TASKS

STAGE_OWN = (
    *("DATA", "IMAGE_FOLDER", "BATCH", "GRAD_ACCUM", "EPOCHS", "LR", "VERSION", "PROJECTOR", "IMAGE_SIZE"),
    "HD_MAX_TILES",
)
"""Variables that mean fine-tuning; pretraining reads `PRETRAIN_` and the name instead."""

OURS = ("output_dir", "seed", "pretrain_mm_mlp_adapter", "tune_mm_mlp_adapter")
"""Training flags that the ablation sets itself, like all `sv_*`."""

DATA_SEED = 1
"""Seed of the toy data."""

ROOM = {"MAX_LENGTH": "--model_max_length", "PER_DEVICE_BATCH": "--per_device_train_batch_size"}
"""Variables of the training scripts that depend on how many tokens an image takes -> the flags that they become."""


@dataclass(frozen=True)
class Request:
    """One ablation. The environment's further variables reach the training scripts as they are."""

    family: str
    rows: list[Row]
    seeds: list[int]
    output: Path
    preset: str = ""
    task: str = "toy"
    bench: str | None = None
    """Folder of the benchmark's questions; with the tiny preset, the toy data."""
    adapter: str | None = None
    """A projector that is pretrained already: no pretraining then."""
    max_steps: int | None = None
    eval_flags: tuple[str, ...] = ()
    train_flags: tuple[str, ...] = ()
    """Further flags of every fine-tuning."""

    @property
    def toy(self) -> Path | None:
        """Folder of the toy data that the tiny preset draws; None where DATA names other data."""
        return self.output / "toy" if self.preset == "tiny" and not os.environ.get("DATA") else None


def model_path(request: Request, seed: int, row: Row) -> Path:
    """The checkpoint of a row."""
    return request.output / f"seed{seed}" / "train" / row.training


def eval_path(request: Request, seed: int, row: Row) -> Path:
    """The evaluation's JSON of a row."""
    return request.output / f"seed{seed}" / "eval" / f"{row.training}.{row.kv}.json"


def plan(request: Request) -> list[Step]:
    """Every step, in order, each once."""
    room = _room_for_tiles(request)
    steps = {step.name: step for seed in request.seeds for step in _steps_of_seed(request, seed, room)}
    return ([_data_step(request.toy)] if request.toy else []) + list(steps.values())


def _data_step(folder: Path) -> Step:
    """The toy data: one drawing for all seeds."""
    command = [sys.executable, "-m", "llava_sv.cli", "data", "toy", "--output", str(folder)]
    command += ["--seed", str(DATA_SEED)]
    for flag, name in (("--train", "TOY_TRAIN"), ("--bench", "TOY_BENCH")):
        command += [flag, os.environ[name]] if os.environ.get(name) else []
    return Step("data", command, folder)


def _keeps_all_tiles(request: Request, row: Row) -> bool:
    """Whether a skipping row has all tokens of LLaVA-HD's tiles in its sequences, as its dense model has."""
    return request.family == "llava_hd" and row.settings is not None and not row.settings["merge"]


def _room_for_tiles(request: Request) -> dict[str, str]:
    """What such rows take from the dense script, of `ROOM`, unless the environment says otherwise."""
    unset = {name: flag for name, flag in ROOM.items() if not os.environ.get(name)}
    if not unset or not any(_keeps_all_tiles(request, row) for row in request.rows):
        return {}
    dense = Step("train/dense", _script(request, "finetune"), request.output, {"PRESET": request.preset})
    flags = training_flags(dense)
    return {name: flags[flag] for name, flag in unset.items()}


def _steps_of_seed(request: Request, seed: int, room: dict[str, str]) -> Iterator[Step]:
    adapter = Path(request.adapter) if request.adapter else None
    if adapter is None:
        pretrain = _pretrain_step(request, seed)
        adapter = pretrain.product / "mm_projector.bin"
        yield pretrain
    for row in request.rows:
        yield _train_step(request, seed, row, adapter, room if _keeps_all_tiles(request, row) else {})
        yield _eval_step(request, seed, row)


def _script(request: Request, name: str) -> list[str]:
    return ["bash", f"{FAMILIES[request.family]}/{name}.sh"]


def _pretrain_step(request: Request, seed: int) -> Step:
    folder = request.output / f"seed{seed}" / "pretrain"
    env = {"PRESET": request.preset, "OUTPUT": str(folder), "SEED": str(seed)}
    env |= {name: os.environ[f"PRETRAIN_{name}"] for name in STAGE_OWN if f"PRETRAIN_{name}" in os.environ}
    if request.toy:
        env |= {"DATA": f"{request.toy}/pretrain.json", "IMAGE_FOLDER": f"{request.toy}/images"}
    needs = request.toy / "pretrain.json" if request.toy else None
    command = _script(request, "pretrain") + _max_steps(request)
    unset = (*(name for name in STAGE_OWN if name not in env), "ADAPTER")
    return Step(f"seed{seed}/pretrain", command, folder, env, unset, needs)


def _train_step(request: Request, seed: int, row: Row, adapter: Path, room: dict[str, str]) -> Step:
    folder = model_path(request, seed, row)
    env = {"PRESET": request.preset, "OUTPUT": str(folder), "SEED": str(seed), "ADAPTER": str(adapter), **room}
    if request.toy:
        env |= {"DATA": f"{request.toy}/sft.json", "IMAGE_FOLDER": f"{request.toy}/images"}
    command = _script(request, "finetune" if row.settings is None else "finetune_skip")
    command += [*row.flags(), *_max_steps(request), *request.train_flags]
    return Step(f"seed{seed}/train/{row.training}", command, folder, env, needs=adapter)


def _max_steps(request: Request) -> list[str]:
    return ["--max_steps", str(request.max_steps)] if request.max_steps else []


def _eval_step(request: Request, seed: int, row: Row) -> Step:
    result, model = eval_path(request, seed, row), model_path(request, seed, row)
    command = [sys.executable, "-m", "llava_sv.cli", "eval", "--model-path", str(model), "--task", request.task]
    data = request.bench or (request.toy and str(request.toy))
    command += ["--data-path", data] if data else []
    command += ["--skip-kv", row.kv, "--timing", "4", "--timing-repeats", "1", "--json", str(result)]
    name = f"seed{seed}/eval/{row.training}.{row.kv}"
    return Step(name, [*command, *request.eval_flags], result, needs=model / "config.json")


def run(request: Request, steps: list[Step]) -> None:
    """Do what is not done yet; after each seed, draw the report of the seeds so far."""
    marks = Marks(request.output)
    commands = {step.name: resolve(step) for step in steps}
    for step in steps:
        marks.check(step, commands[step.name])
    begun = time.monotonic()
    for number, step in enumerate(steps):
        if marks.seconds(step) is None:
            said = f"[{time.monotonic() - begun:.0f} s] {step.name} ..."
            print(f"{said} (step {number + 1} of {len(steps)}, {progress(request, steps, marks)})", flush=True)
            marks.begin(step, commands[step.name])
            seconds = execute(step, request.output / "logs" / f"{step.name.replace('/', '.')}.log")
            marks.end(step, commands[step.name], seconds)
        last = number + 1 == len(steps) or _seed_of(steps[number + 1]) != _seed_of(step)
        if _seed_of(step) and last:
            left = {_seed_of(other) for other in steps if marks.seconds(other) is None}
            report(request, [seed for seed in request.seeds if f"seed{seed}" not in left])
    print(f"[{time.monotonic() - begun:.0f} s] {progress(request, steps, marks)}")
    print((request.output / "ablation.md").read_text(encoding="utf-8"))
    print(f"written: {request.output}/ablation.md, ablation.json and ablation.png")


def _seed_of(step: Step) -> str:
    return step.name.split("/")[0] if "/" in step.name else ""


def progress(request: Request, steps: list[Step], marks: Marks) -> str:
    """Rows done, and the time that the other steps take if they take as long as those of their kind have."""
    took: dict[str, list[float]] = {}
    left: list[str] = []
    for step in steps:
        seconds = marks.seconds(step)
        if seconds is None:
            left.append(step.kind)
        else:
            took.setdefault(step.kind, []).append(seconds)
    rows = [(seed, row) for seed in request.seeds for row in request.rows]
    done = sum(eval_path(request, seed, row).is_file() for seed, row in rows)
    said = f"rows done {done} of {len(rows)}"
    if not left:
        return said
    known = [sum(took[kind]) / len(took[kind]) for kind in left if kind in took]
    about = f"{'about' if len(known) == len(left) else 'more than'} {sum(known) / 60:.0f} min left"
    return f"{said}, {about if known else 'time left not known yet'}"


def report(request: Request, seeds: list[int]) -> None:
    """Table and chart of `seeds`, into OUTPUT."""
    sources = {
        (row.key, seed): (eval_path(request, seed, row), model_path(request, seed, row))
        for row in request.rows
        for seed in seeds
    }
    about: dict[str, Any] = {"family": request.family, "preset": request.preset, "task": request.task, "seeds": seeds}
    about |= {"data_seed": DATA_SEED if request.toy else None}
    write_report(request.output, request.rows, sources, about)


def build_parser() -> argparse.ArgumentParser:
    """Flags of the ablation; what it does not know goes to fine-tuning."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_sv.eval.ablation",
        description="Train and score the rows of an ablation (scripts/ablation.sh calls this).",
        epilog="example: FAMILY=llava PRESET=tiny ROWS=0,10,11 bash scripts/ablation.sh",
        allow_abbrev=False,
    )
    parser.add_argument("--family", default="cos", help=f"one of: {', '.join(FAMILIES)} (default: %(default)s)")
    parser.add_argument("--rows", help="tables (table4, table6, table7) and rows of the paper")
    parser.add_argument("--row", action="append", default=[], metavar="'NAME: SETTINGS'", help="a row of one's own")
    parser.add_argument("--seeds", default="1 2 3", help="training seeds")
    parser.add_argument("--output", type=Path, help="folder (default: playground/ablation/FAMILY)")
    parser.add_argument("--preset", default="", help="preset of the training scripts, such as tiny")
    parser.add_argument("--task", help=f"benchmark to score on: {', '.join(TASKS)} (tiny: toy)")
    parser.add_argument("--bench", help="folder of the benchmark")
    parser.add_argument("--adapter", help="pretrained projector; without one it is pretrained for each seed")
    parser.add_argument("--max-steps", help="optimizer steps of every training")
    parser.add_argument("--eval-flags", default="", help="further flags of llava-sv eval")
    parser.add_argument("--dry-run", action="store_true", help="print each command and run none")
    return parser


def read_request(args: argparse.Namespace, train_flags: list[str]) -> Request:
    """Arguments to a `Request`; `UserError` for what cannot be run."""
    rows = choose_rows(args.family, args.rows, args.row)
    seeds = [word for word in re.split(r"[\s,]+", args.seeds) if word]
    if not seeds or not all(word.isdigit() for word in seeds):
        raise UserError(f"SEEDS: expected whole numbers such as '1 2 3', got {args.seeds!r}")
    if args.max_steps is not None and not (args.max_steps.isdigit() and int(args.max_steps)):
        raise UserError(f"MAX_STEPS: expected a whole number of 1 or more, got {args.max_steps!r}")
    if train_flags and not train_flags[0].startswith("--"):
        raise UserError(f"unexpected {train_flags[0]!r}: variables stand before the command, flags begin with --")
    for word in train_flags:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        if word.startswith("--") and (name in OURS or name.startswith("sv_")):
            raise UserError(f"{word}: the ablation sets this flag itself; settings of a row go into --row 'NAME: ...'")
    eval_flags = shlex.split(args.eval_flags)
    _, stray = eval_parser().parse_known_args(["--model-path", "", "--task", "", *eval_flags])
    if stray:
        raise UserError(f"EVAL_FLAGS: llava-sv eval has no {stray[0]!r}; see llava-sv eval --help")
    task = args.task or ("toy" if args.preset == "tiny" else None)
    if task not in TASKS:
        raise UserError(f"TASK={task or ''}: name the benchmark to score on; known: {', '.join(TASKS)}")
    return Request(
        family=args.family,
        rows=rows,
        seeds=list(dict.fromkeys(map(int, seeds))),
        output=args.output or Path("playground/ablation") / args.family,
        preset=args.preset,
        task=task,
        bench=args.bench,
        adapter=args.adapter,
        max_steps=int(args.max_steps) if args.max_steps else None,
        eval_flags=tuple(eval_flags),
        train_flags=tuple(train_flags),
    )


def check_train_flags(words: tuple[str, ...]) -> None:
    """`UserError` in the words of training's own parser, which is a process of its own: rooms import downwards only."""
    if not words:
        return
    command = [sys.executable, "-m", "llava_sv.train.flags", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"flags of fine-tuning: {said[-1].removeprefix('error: ')}")


def main(argv: list[str]) -> int:
    """`python -m llava_sv.eval.ablation ...`, in the repository's root."""
    args, further = build_parser().parse_known_args(argv)
    request = read_request(args, further)
    check_train_flags(request.train_flags)
    steps = plan(request)
    if args.dry_run:
        for step in steps:
            resolve(step)
            print(step.line())
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(request, steps)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror}; mend it and run this again: it goes on here") from error
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
