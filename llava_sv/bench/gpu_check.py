"""`scripts/gpu_check.sh`: everything that needs a GPU, in one call and within a time.

A folder arrives; results leave in it, each written as soon as it is there: parity of kernels, `bench train` and `bench
infer` at real width for every family, the memory plan beside measured peaks. Each row is a process of its own, so that
one which fails, hangs or runs out of memory loses no other. Needs neither pytest nor DeepSpeed, and no network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sv.bench import gpu_page
from llava_sv.bench.presets import FAMILIES
from llava_sv.bench.sizes import SIZES as KNOWN
from llava_sv.bench.sizes import dtype_name, known_words
from llava_sv.errors import UserError, exit_on_any_trouble
from llava_sv.files import check_can_write, keep_existing, write_json, write_text

EXAMPLE = """example:
  bash scripts/gpu_check.sh --out runs/gpu_check
  bash scripts/gpu_check.sh --out runs/short --sizes gpu-8b-4layers --families llava --minutes 4
  bash scripts/gpu_check.sh --out runs/cpu --device cpu"""

ROOT = Path(__file__).resolve().parents[2]
REPORT, PAGE = "gpu_check.json", "gpu_check.md"
SIZES = {"cuda": "gpu-8b-4layers,gpu-8b", "cpu": "cpu"}
"""Device -> sizes by default: of the real model, first a slice of its layers, then the whole."""

REPEATS = {"tiny": 1, "cpu": 3, "gpu-8b-4layers": 7, "gpu-8b": 5}
"""Rounds that are measured, by size."""

EVERY = {"tiny": 40, "cpu": 12}
"""Each so many-th run of the memory plan's, by size; 6 else."""

LEAST_S = {"cuda": 20, "cpu": 5}
"""Seconds that must be left for a row to start."""

FAIR = 3
"""A row may take so many times its share of the time that is left, and `ENOUGH_S` in any case."""
ENOUGH_S = 90

OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "MemoryError")
DOES_NOT_FIT = ("does not fit", "needs about")
BAD = ("failed", "out of memory", "stopped")
"""Statuses that the exit code tells of. Rows left out for want of time, and sizes that do not fit, are only named."""


@dataclass(frozen=True)
class Row:
    """One measurement: a module of this package, its arguments, and the file that it writes in the folder."""

    name: str
    module: str
    argv: tuple[str, ...]
    file: str

    @property
    def log(self) -> str:
        """The file that what it prints goes to."""
        return self.file.replace(".json", ".log")

    def command(self, out: Path) -> list[str]:
        """The process."""
        return [sys.executable, "-m", f"llava_sv.{self.module}", *self.argv, "--json", str(out / self.file)]


def rows_of(args: argparse.Namespace, device: str) -> list[Row]:
    """What runs on the device of this name, what is quick and certain first."""
    parity = Row(
        "parity", "bench.gpu_parity", ("--device", device, "--families", ",".join(args.families)), "parity.json"
    )
    every = str(args.memory_every if args.memory_every is not None else EVERY.get(args.sizes[0], 6))
    memory = Row("memory", "bench.memory", ("--device", device, "--every", every), "memory.json")
    groups = [_bench_rows(size, args, device) for size in args.sizes]
    first, *rest = groups
    return [
        *([] if args.no_parity else [parity]),
        *first,
        *([] if every == "0" else [memory]),
        *(row for group in rest for row in group),
    ]


def _bench_rows(size: str, args: argparse.Namespace, device: str) -> list[Row]:
    repeats = str(args.repeats or REPEATS.get(size, 5))
    common = ("--size", size, "--device", device, "--dtype", args.dtype, "--repeats", repeats)
    peers = () if size != "gpu-8b" else ("--no-peers",)
    return [
        Row(
            f"{what}, {size}, {family}",
            f"bench.{what}",
            (*common, "--family", family, *peers),
            f"{what}-{size}-{family}.json",
        )
        for family in args.families
        for what in ("train", "infer")
    ]


def run_row(row: Row, out: Path, limit_s: float) -> dict[str, Any]:
    """Run it for `limit_s` seconds at most; its status, seconds, and the last line where something is wrong."""
    start = time.monotonic()
    log, environment = out / row.log, _environment()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            row.command(out), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    status, note = judge(code, log.read_text(encoding="utf-8", errors="replace"), limit_s)
    found = {"status": status, "seconds": round(time.monotonic() - start, 1), "note": note}
    return {"name": row.name, **found, "file": row.file if (out / row.file).exists() else None, "log": log.name}


def _environment() -> dict[str, str]:
    """This process' own, with this tree's package first."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, if any is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judge(code: int | None, said: str, limit_s: float) -> tuple[str, str]:
    """(status, note) of an exit code (None: it was stopped) and of what was printed."""
    lines = [line.strip() for line in said.replace("\r", "\n").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else ""
    if code == 0:
        return "ok", ""
    if code is None:
        return "stopped", f"did not end within {limit_s:.0f} s"
    if code == 2 and any(words in last for words in DOES_NOT_FIT):
        return "does not fit", last
    found = next((line for line in reversed(lines) if any(words in line for words in OUT_OF_MEMORY)), None)
    if found is not None:
        return "out of memory", found[:300]
    return "failed", last if code > 0 else f"ended by signal {-code}. {last}".strip()


def run_all(rows: list[Row], out: Path, minutes: float, kind: str, note: Callable[[dict[str, Any]], None]) -> None:
    """Every row that the time allows, in order; `note` is called with each result. kind: cpu or cuda."""
    deadline = time.monotonic() + 60 * minutes
    for index, row in enumerate(rows):
        left = deadline - time.monotonic()
        if left < LEAST_S[kind]:
            words = f"no time left of {minutes:g} minutes: ask for more with --minutes"
            note({"name": row.name, "status": "left out", "seconds": 0.0, "note": words, "file": None})
            continue
        share = FAIR * left / (len(rows) - index)
        note(run_row(row, out, min(left, max(share, ENOUGH_S))))


def describe(device: str | None) -> dict[str, Any]:
    """On what it runs: asked of a process of its own, which leaves the GPU's memory alone as it ends."""
    asked = ["--device", device] if device else []
    command = [sys.executable, "-m", "llava_sv.bench.gpu_parity", "--describe", *asked]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        # advice may follow what an exception says
        telling = [line for line in said if re.match(r"error: |[\w.]*(Error|Exception): ", line)] or said
        raise UserError(telling[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="bash scripts/gpu_check.sh",
        description="Check and measure a machine with a GPU: parity, benchmarks at real width, memory. "
        "On a CPU it runs at size cpu.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier check there")
    parser.add_argument("--minutes", type=float, default=9.0, help="rows that do not fit are left out and named [9]")
    parser.add_argument("--device", help="cpu, cuda, or one of several GPUs, cuda:1 [cuda where there is one]")
    parser.add_argument("--sizes", help=f"of {', '.join(KNOWN)}, joined by commas [{SIZES['cuda']}; cpu on a CPU]")
    parser.add_argument("--families", default=",".join(FAMILIES), help="joined by commas [all]")
    parser.add_argument("--dtype", default="bf16", help="precision of the benchmarks [bf16]")
    parser.add_argument("--repeats", type=int, help="rounds that are measured [by size]")
    parser.add_argument("--memory-every", type=int, metavar="N", help="each N-th run of the memory plan's; 0: none [6]")
    parser.add_argument("--no-parity", action="store_true", help="leave the comparison of kernels out")
    args = parser.parse_args(argv)
    args.families = known_words("--families", args.families, FAMILIES)
    args.sizes = known_words("--sizes", args.sizes, KNOWN) if args.sizes else None
    dtype_name(args.dtype)
    for flag, value, least in (("--repeats", args.repeats, 1), ("--memory-every", args.memory_every, 0)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value}: at least {least}")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g}: expected more than 0")
    return args


def check_folder(out: Path, overwrite: bool) -> None:
    """`UserError` where the results of an earlier check are there and may not be replaced, or none can be written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    keep_existing(str(out / REPORT), overwrite, "--out")
    check_can_write("--out", out / REPORT)


def make_room(out: Path, rows: list[Row], overwrite: bool) -> None:
    """Make the folder ready for these rows: what an earlier check left there is kept, unless it may be replaced.

    A check that was stopped in its first row has left that row's files, and no report.
    """
    names = [PAGE, *(name for row in rows for name in (row.file, row.log))]
    if (out / REPORT).exists():
        # a file that is a report by its name alone names no other
        with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError):
            known = json.loads((out / REPORT).read_text(encoding="utf-8"))
            names += [Path(row[key]).name for row in known["rows"] for key in ("file", "log") if row.get(key)]
    for name in names:
        keep_existing(str(out / name), overwrite, "--out")
        (out / name).unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    """Exit code 1 where a row failed, ran out of memory or had to be stopped."""
    args = parse(argv)
    out = Path(args.out).resolve()
    check_folder(out, args.overwrite)
    machine = describe(args.device)
    kind = "cuda" if "capability" in machine else "cpu"
    device = args.device or kind
    args.sizes = args.sizes or SIZES[kind].split(",")
    rows = rows_of(args, device)
    make_room(out, rows, args.overwrite)
    asked = {"device": device, "sizes": args.sizes, "families": args.families, "minutes": args.minutes}
    report: dict[str, Any] = {"environment": machine, **asked, "dtype": args.dtype, "seconds": 0.0, "rows": []}
    start = time.monotonic()

    def note(result: dict[str, Any]) -> None:
        report["rows"].append(result)
        report["seconds"] = round(time.monotonic() - start, 1)
        write_json(out / REPORT, report)
        write_text(out / PAGE, gpu_page.render(report, out))
        print(f"{result['name']}: {result['status']}, {result['seconds']:.0f} s. {result['note']}".strip(), flush=True)

    print(f"{machine['device']}: {len(rows)} rows in {args.minutes:g} minutes at most, into {out}", flush=True)
    run_all(rows, out, args.minutes, kind, note)
    print(f"\n{gpu_page.render(report, out)}")
    return int(any(row["status"] in BAD for row in report["rows"]))


def _end_with_the_row(number: int, frame: Any) -> None:
    """A row is in a session of its own: what ends this process must end the row as well (see `run_row`)."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end_with_the_row)
    sys.exit(exit_on_any_trouble(main, sys.argv[1:]))
