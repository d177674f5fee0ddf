"""`llava-sv bench memory`: the plan's figures beside measured ones, run by run. Docs/Memory.md has the table.

Each case of `memory_cases` is planned on shapes and then trained for two steps with its memory watched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from llava_sv.bench import clock
from llava_sv.bench.cells import in_one_line
from llava_sv.bench.memory_cases import Case, every_case, plan_of, ranked_cases
from llava_sv.bench.memory_measure import peak_of, train_steps
from llava_sv.bench.memory_ranks import measure
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import keep_existing, write_json

EXAMPLE = """example:
  llava-sv bench memory --family llava --json memory.json
  llava-sv bench memory --ranks"""

TOLERANCE = 0.15
"""How far a plan may be from what is measured."""


def compare(case: Case, measured: int) -> dict[str, Any]:
    """One row: bytes planned and measured, and their ratio."""
    planned = plan_of(case)
    return {
        "case": case.name,
        "family": case.family,
        "layout": case.layout,
        "planned_bytes": planned.tensors,
        "measured_bytes": measured,
        "ratio": planned.tensors / measured,
        "phase": planned.phase,
        "parts": planned.parts,
    }


def on_device(cases: list[Case], device: torch.device) -> list[Case]:
    """The cases as they can be compared there: on CUDA in bf16, as GPUs train. The plan follows a fused attention, and
    CUDA has none for grouped heads in float32: scores of all pairs are kept there."""
    return [replace(case, precision="bf16") for case in cases] if device.type == "cuda" else cases


def run_alone(case: Case, device: torch.device) -> dict[str, Any]:
    """A case of one process, here."""
    return compare(case, peak_of(lambda: train_steps(case.config(), case.work(), case.prepare, device), device))


def run_ranked(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Cases of two processes, on CPU."""
    return [compare(case, peak) for case, peak in zip(cases, measure(cases))]


def render(rows: list[dict[str, Any]]) -> str:
    """Markdown rows: the case, MiB planned and measured, and the ratio."""
    lines = ["| run | planned MiB | measured MiB | planned / measured |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        planned, measured = row["planned_bytes"] / 2**20, row["measured_bytes"] / 2**20
        lines.append(f"| {row['case']} | {planned:.1f} | {measured:.1f} | {row['ratio']:.3f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`llava-sv bench memory ...`. Exit code 1 where a plan is further off than `TOLERANCE`."""
    parser = argparse.ArgumentParser(
        prog="llava-sv bench memory",
        description="Plan the memory of small training runs, measure it, and compare.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", help="llava, llava_hd or cos only")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th run only [1: all]")
    parser.add_argument("--ranks", action="store_true", help="the runs over two processes (DDP, ZeRO-1 to 3) instead")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one; --ranks: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--overwrite", action="store_true", help="replace what --json names, where it exists")
    args = parser.parse_args(argv)
    keep_existing(args.json, args.overwrite)
    cases = [case for case in (ranked_cases() if args.ranks else every_case()) if args.family in (None, case.family)]
    if not cases:
        raise UserError(f"--family: unknown family {args.family!r}; known: llava, llava_hd, cos")
    if args.every < 1:
        raise UserError(f"--every {args.every}: expected 1 or more")
    device = clock.pick_device("cpu" if args.ranks else args.device)
    cases = on_device(cases, device)[:: args.every]
    rows = run_ranked(cases) if args.ranks else [run_alone(case, device) for case in tqdm(cases, unit="run")]
    environment = clock.environment(device, torch.float32)
    print(render(rows))
    print(in_one_line({key: value for key, value in environment.items() if key not in ("dtype", "attention")}))
    if args.json:
        write_json(args.json, {"rows": rows, "environment": environment})
    off = [row["case"] for row in rows if abs(row["ratio"] - 1) > TOLERANCE]
    if off:
        print(f"further off than {TOLERANCE:.0%}: {'; '.join(off)}", file=sys.stderr)
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
