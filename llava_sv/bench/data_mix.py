"""How fast sources are mixed, and how much of that is reading their files. Called by `bench.data`.

A folder arrives; three JSON sources are written there and mixed by `llava-sv data mix`, in one process; figures leave.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from llava_sv.bench.data_records import write_records
from llava_sv.data import mix

SOURCES = 3
MOST = 300_000
"""Records mixed: the figures are a record's, and more of them change nothing."""


def measure_mix(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """`mix_read_share`: seconds inside the readers of annotation files over all seconds of mixing; `mix_convert_share`:
    in turning what they give into records; `mix_records_per_second`, in one process."""
    root = folder / "mixing"
    names = [f"source-{number}" for number in range(SOURCES)]
    lines = []
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        write_records(root / name / "records.json", max(min(count, MOST) // SOURCES, 1), seed + number)
        lines.append({"name": name, "annotations": f"{name}/records.json", "images": name, "converter": "llava_json"})
    recipe = root / "recipe.yaml"
    recipe.write_text(json.dumps({"name": "bench", "sources": lines}), encoding="utf-8")
    report = root / "report.json"
    with contextlib.redirect_stdout(io.StringIO()):
        mix.main([str(recipe), "--root", str(root), "--no-images", "--workers", "1", "--json", str(report)])
    made = json.loads(report.read_text(encoding="utf-8"))
    timings = made["timings"]
    seconds = timings["total_seconds"]
    return {
        "mix_records": made["totals"]["annotations"],
        "mix_records_per_second": made["totals"]["annotations"] / seconds,
        "mix_read_share": timings["read_seconds"] / seconds,
        "mix_convert_share": timings["convert_seconds"] / seconds,
    }
