"""`llava-sv bench data`: an index of millions of records made, opened and read; `json.load` beside it; pictures loaded.

A number of records arrives; seconds, bytes and rates leave, each measured in a process of its own
(`bench.data_measure`), so that none inherits another's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_sv.bench import clock
from llava_sv.bench.data_mix import measure_mix
from llava_sv.bench.data_records import write_records
from llava_sv.errors import UserError
from llava_sv.files import keep_existing, write_json

EXAMPLE = """example:
  llava-sv bench data --records 9000000 --json data.json"""

JSON_RECORDS = 500_000
"""`json.load` is measured on so many at most, and scaled: the whole would not fit into memory."""

RECORD_BYTES = 1000
INDEX_BYTES = 820
"""Disk that a synthetic record takes, as JSON and in the index, with some room."""

SPARE_BYTES = 1 << 29


def check_disk(folder: Path, count: int) -> None:
    """`UserError` where the files would not fit."""
    need = count * (RECORD_BYTES + INDEX_BYTES) + min(count, JSON_RECORDS) * RECORD_BYTES + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"--records {count}: needs {need / 1e9:.1f} GB of disk in {folder}, which has {free / 1e9:.1f} GB free; "
            "name another folder with --dir, or fewer records"
        )


def measure(what: str, *arguments: Any) -> tuple[dict[str, Any], int]:
    """(what the measurement returns, the most bytes that its process and those below it held at a moment)."""
    import psutil

    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "llava_sv.bench.data_measure", what, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        held = 0
        try:
            for one in [watched, *watched.children(recursive=True)]:
                held += one.memory_info().rss
        except psutil.Error:  # one of them is just ending
            pass
        peak = max(peak, held)
        time.sleep(0.05)
    assert process.stdout is not None
    said = process.stdout.read()
    if process.returncode:
        raise UserError(
            f"bench data: measuring {what} failed with exit code {process.returncode}; see what it said above"
        )
    return json.loads(said.splitlines()[-1]), peak


def run(folder: Path, count: int, workers: int | None, seed: int) -> dict[str, Any]:
    """The report on `count` records, in `folder`."""
    data, cache = folder / "records.json", folder / "cache"
    write_records(data, count, seed)
    built, peak = measure("build", data, cache, workers or 0)
    index = Path(built["index"])
    sliced = min(count, JSON_RECORDS)
    write_records(folder / "slice.json", sliced, seed)
    loaded, _ = measure("json", folder / "slice.json")
    scale = count / sliced
    steps = {
        "open": ("open", index),
        "random": ("random", index, seed),
        "order": ("order", index, seed),
        "loader": ("loader", folder / "pictures", seed),
    }
    found = {}
    with tqdm(steps.items(), desc="measuring", unit="step") as bar:
        for name, (what, *arguments) in bar:
            bar.set_postfix_str(name)
            found[name] = measure(what, *arguments)[0]
    return {
        "records": count,
        "json_bytes": data.stat().st_size,
        "index_bytes": index.stat().st_size,
        "workers": built["workers"],
        "build_peak_bytes": peak,
        "build_seconds": built["seconds"],
        **{name: value for step in found.values() for name, value in step.items()},
        "json_load_seconds": loaded["seconds"] * scale,
        "json_load_rss_bytes": int(loaded["rss_bytes"] * scale),
        "json_load_records": sliced,
        "json_load_scale": scale,
        **measure_mix(folder, count, seed),
    }


def render(report: dict[str, Any]) -> str:
    """The tables of docs/Benchmarks.md."""
    gib, mib = 2**30, 2**20
    scaled = f"`json.load` of {report['json_load_records']:,}, times {report['json_load_scale']:g}"
    rows = [
        f"| {report['records']:,} records ({report['json_bytes'] / 1e9:.1f} GB of JSON) | index | {scaled} |",
        "| --- | --- | --- |",
        f"| made once, seconds ({report['workers']} processes) | {report['build_seconds']:.0f} | - |",
        f"| memory while it is made, all processes | {report['build_peak_bytes'] / gib:.2f} GiB | - |",
        f"| opened, seconds | {report['open_seconds']:.3f} | {report['json_load_seconds']:.0f} |",
        f"| memory that opening adds to a process | {report['open_rss_bytes'] / mib:.0f} MiB | "
        f"{report['json_load_rss_bytes'] / gib:.1f} GiB |",
        f"| records a second, at random | {report['random_records_per_second']:,.0f} | - |",
        f"| order of an epoch by length: seconds, memory | {report['order_seconds']:.1f} s, "
        f"{report['order_rss_bytes'] / mib:.0f} MiB | - |",
        "",
        "| images a second and core | training's data set | PIL loop | ratio |",
        "| --- | --- | --- | --- |",
        f"| 640 x 480 JPEG to 336 x 336 | {report['loader_images_per_second']:.0f} | "
        f"{report['pil_images_per_second']:.0f} | {report['loader_ratio']:.2f} |",
    ]
    rows += [
        "",
        f"One process mixes {report['mix_records_per_second']:,.0f} records a second: {report['mix_read_share']:.0%} "
        f"of its time is opening, reading and parsing the sources' files, {report['mix_convert_share']:.0%} converting "
        f"what they hold. It takes {report['mix_over_bare_read']:.1f} times the CPU seconds of a loop that only reads.",
    ]
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """`llava-sv bench data ...`."""
    parser = argparse.ArgumentParser(
        prog="llava-sv bench data",
        description="Index synthetic records, open and read them; json.load beside it; pictures through the data set.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", type=int, default=1_000_000, metavar="N", help="how many [1000000]")
    parser.add_argument("--dir", metavar="DIR", help="write the files below this folder [the system's temporary one]")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that make the index [as llava-sv data index]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the records and the order of reading [0]")
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    parser.add_argument("--overwrite", action="store_true", help="replace what --json names, where it exists")
    args = parser.parse_args(argv)
    keep_existing(args.json, args.overwrite)
    if args.records < 1:
        raise UserError(f"--records: expected 1 or more, got {args.records}")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: expected 1 or more, got {args.workers}")
    if args.dir is not None and not Path(args.dir).is_dir():
        raise UserError(f"--dir: no such folder: {args.dir}")
    check_disk(Path(args.dir or tempfile.gettempdir()), args.records)
    with tempfile.TemporaryDirectory(prefix="llava-sv-bench-", dir=args.dir) as folder:
        report = run(Path(folder), args.records, args.workers, args.seed)
    report["environment"] = clock.environment(torch.device("cpu"), torch.float32)
    print(render(report))
    if args.json:
        write_json(args.json, report)
    return 0
