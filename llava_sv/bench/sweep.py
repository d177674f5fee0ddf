"""`llava-sv bench sweep`: `bench train` and `bench infer` over a grid of batches, lengths, budgets and layers.

Each row is written as it is measured; a sweep that was ended goes on where it stood. A table with break-even points and
a picture leave at the end.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_sv.bench import clock, infer, room, sweep_page, train
from llava_sv.bench.flags import Job, OutOfMemory, answer_lengths, check_outputs, counts, make_job, make_parser
from llava_sv.bench.sizes import BenchSize, find_size, known_words, resized
from llava_sv.bench.sweep_rows import Rows
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.extras import require
from llava_sv.files import check_can_write, write_text

EXAMPLE = """example:
  llava-sv bench sweep --size cpu --text-tokens 64,256,1024 --json sweep.json --png sweep.png
  llava-sv bench sweep --size cpu --what infer --batch 1,8 --new-tokens 16,64,256 --json sweep.json
  llava-sv bench sweep --size gpu-8b --layers 4,8 --budgets 100+156,256+320 --json sweep.json --markdown sweep.md"""

MEASURES: dict[str, Callable[[Job], dict[str, Any]]] = {"train": train.measure, "infer": infer.measure}
NEW_TOKENS = "16,64,256"
TEXTS = (0.5, 1, 4)
"""Text lengths by default, as multiples of the size's own."""

DRAWINGS = ("--markdown", "--png")
"""Made anew each time of all rows; a file that the sweep did not draw itself is kept."""

Point = tuple[str, Job]
"""`train` or `infer`, and what it is to measure."""


def budgets(args: argparse.Namespace) -> list[tuple[int | None, int | None]]:
    """Pairs of retained and skipped tokens; None: the size's own."""
    if args.budgets is None:
        retained = [None] if args.num_retained is None else counts("--num-retained", args.num_retained)
        skipped = [None] if args.num_skipped is None else counts("--num-skipped", args.num_skipped, least=0)
        return list(itertools.product(retained, skipped))
    if args.num_retained is not None or args.num_skipped is not None:
        raise UserError("--budgets does not go with --num-retained and --num-skipped: give one or the other")
    pairs = [part.strip().split("+") for part in args.budgets.split(",")]
    if not all(len(pair) == 2 and all(value.isascii() and value.isdigit() for value in pair) for pair in pairs):
        raise UserError(f"--budgets {args.budgets}: expected retained+skipped, such as 100+156 or 100+156,256+320")
    return list(dict.fromkeys((int(retained), int(skipped)) for retained, skipped in pairs))


def optional(flag: str, text: str | None) -> list[int | None]:
    """A list of counts, or [None]: the size's own."""
    return [None] if text is None else list(counts(flag, text))


def text_lengths(args: argparse.Namespace, size: BenchSize) -> list[int]:
    """`--text-tokens`, or multiples of the size's own."""
    if args.text_tokens is not None:
        return counts("--text-tokens", args.text_tokens)
    return [int(size.text_tokens * factor) for factor in TEXTS]


def grid(args: argparse.Namespace) -> list[Point]:
    """Every point that the arguments ask for, checked, in the order in which they are measured."""
    points: list[Point] = []
    what = known_words("--what", args.what, MEASURES)
    for family in dict.fromkeys(part.strip() for part in args.family.split(",")):
        size = find_size(args.size, family)
        for layers, batch, text, (retained, skipped) in itertools.product(
            optional("--layers", args.layers),
            optional("--batch", args.batch),
            text_lengths(args, size),
            budgets(args),
        ):
            job = make_job(args, resized(size, layers, batch, text, retained, skipped), ())
            for name in what:
                lengths = answer_lengths(args.new_tokens, size) if name == "infer" else ()
                points.append((name, replace(job, new_tokens=lengths)))
    return points


def fitting(points: list[Point], rows: Rows) -> list[Point]:
    """The points that are measured already or fit into memory; the others are said. `UserError` where none does."""
    kept: list[Point] = []
    refused: list[UserError] = []
    for what, job in points:
        if rows.find(what, job, clock.environment(job.device, job.dtype)) is not None:
            kept.append((what, job))
            continue
        longest = max(job.new_tokens, default=0)
        peers = job.with_peers
        of = (
            room.of_infer(job.size, job.dtype, longest, job.device)
            if longest
            else room.of_train(job.size, job.dtype, peers, job.device)
        )
        try:
            room.check_room(of, job.device, f"{job.label}, {job.size.text_tokens} text tokens", what, peers)
            kept.append((what, job))
        except UserError as error:
            refused.append(error)
    if not kept:
        raise refused[0]
    for reason in refused:
        print(f"left out: {reason}", file=sys.stderr)
    return kept


def run(points: list[Point], rows: Rows) -> list[dict[str, Any]]:
    """The rows of all points, those measured that were not there."""
    found = []
    lost: list[OutOfMemory] = []
    fresh = 0
    with tqdm(points, desc="sweep", unit="point") as bar:
        for what, job in bar:
            environment = clock.environment(job.device, job.dtype)
            row = rows.find(what, job, environment)
            if row is None:
                fresh += 1
                asked = job.settings
                bar.set_postfix_str(f"{what}, {asked['family']}, batch {asked['batch']}, text {asked['text_tokens']}")
                _let_go(job.device)
                try:
                    row = rows.add(what, job, environment, MEASURES[what](job))
                except OutOfMemory as error:
                    bar.write(f"left out: {error}", file=sys.stderr)
                    lost.append(error)
                    continue
            found.append(row)
    if not found:
        raise lost[0]
    there = len(found) - (fresh - len(lost))
    print(f"{fresh - len(lost)} measured" + (f", {there} were there already" if there else ""), file=sys.stderr)
    return found


def _let_go(device: torch.device) -> None:
    """The models of the point before, and the memory in pieces of their sizes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("sweep", "Time training steps and answers over a grid, dense against skipping.", EXAMPLE, True)
    parser.add_argument("--what", default="train,infer", help="train, infer, or both (default: both)")
    parser.add_argument("--budgets", metavar="N+N,...", help="retained+skipped, such as 100+156,256+320")
    parser.add_argument(
        "--new-tokens", metavar="N,...", default=NEW_TOKENS, help=f"answers' lengths (default {NEW_TOKENS})"
    )
    parser.add_argument("--png", metavar="FILE", help="draw it here")
    return parser


def main(argv: list[str]) -> int:
    """`llava-sv bench sweep ...`. A sweep's own `--json` is gone on with, not refused; `--overwrite` begins anew."""
    args = _parser().parse_args(argv)
    points = grid(args)
    if args.png:
        require("matplotlib")
    if args.json:
        check_can_write("--json", Path(args.json))
    rows = Rows(args.json, anew=args.overwrite)
    for flag in DRAWINGS:
        path = getattr(args, flag.removeprefix("--"))
        if path is not None and not rows.drew(path):
            check_outputs(args, flag)
    found = run(fitting(points, rows), rows)
    page = sweep_page.render(found)
    print(page)
    if args.markdown:
        write_text(args.markdown, page + "\n")
    if args.png:
        sweep_page.draw(found, args.png)
    rows.note_drawn([path for path in (args.markdown, args.png) if path])
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
