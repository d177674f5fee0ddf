"""How fast sources are mixed, and how much of that is reading their files. Called by `bench.data`.

A folder arrives; three JSON sources are written there and mixed by `llava-sv data mix`, in one process; figures leave.
Beside it a bare loop, `for record in file`, reads the same files by the same reader.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

from llava_sv.bench.data_records import write_records
from llava_sv.data import mix
from llava_sv.data.json_stream import read_values

SOURCES = 3
MOST = 300_000
"""Records mixed: the figures are a record's, and more of them change nothing."""

FEW = 300
"""Records of the mixture made first, so that what is only loaded once is loaded."""


def measure_mix(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """`mix_read_share`: seconds inside the readers of annotation files (open, read, parse) over all seconds of mixing;
    `mix_convert_share`: in turning what they give into records; `mix_records_per_second`, in one process.

    `mix_cpu_seconds` and `bare_read_cpu_seconds`: the process' CPU seconds, all its threads, of mixing and of the bare
    loop over the same files; `mix_over_bare_read`, one over the other.
    """
    _mix(folder / "first", min(count, FEW), seed)
    return _mix(folder / "mixing", min(count, MOST), seed)


def _mix(root: Path, count: int, seed: int) -> dict[str, Any]:
    names = [f"source-{number}" for number in range(SOURCES)]
    lines, paths = [], [root / name / "records.json" for name in names]
    for number, (name, path) in enumerate(zip(names, paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, max(count // SOURCES, 1), seed + number, quiet=True)
        lines.append({"name": name, "annotations": f"{name}/records.json", "images": name, "converter": "llava_json"})
    recipe = root / "recipe.yaml"
    recipe.write_text(json.dumps({"name": "bench", "sources": lines}), encoding="utf-8")
    report = root / "report.json"
    bare = _read(paths)
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        mix.main([str(recipe), "--root", str(root), "--no-images", "--workers", "1", "--json", str(report)])
    mixing = time.process_time() - began
    bare = (bare + _read(paths)) / 2
    made = json.loads(report.read_text(encoding="utf-8"))
    timings = made["timings"]
    seconds = timings["total_seconds"]
    return {
        "mix_records": made["totals"]["annotations"],
        "mix_records_per_second": made["totals"]["annotations"] / seconds,
        "mix_read_share": timings["read_seconds"] / seconds,
        "mix_convert_share": timings["convert_seconds"] / seconds,
        "mix_cpu_seconds": mixing,
        "bare_read_cpu_seconds": bare,
        "mix_over_bare_read": mixing / bare,
    }


def _read(paths: list[Path]) -> float:
    """CPU seconds of reading the files and doing nothing with what they hold."""
    began = time.process_time()
    for path in paths:
        for _ in read_values(path):
            pass
    return time.process_time() - began
