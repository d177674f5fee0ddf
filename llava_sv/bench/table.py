"""Reports of `bench train` and `bench infer` in; rows of docs/Benchmarks.md out. `scripts/gpu_check.sh` shows them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llava_sv.bench.peers import PEER
from llava_sv.errors import UserError, exit_on_user_error

SHARED = ["size", "region", "dense ms", "skip ms", "time saved", "FLOPs saved"]
TRAIN_HEAD = [*SHARED, "time / FLOPs", "CPU time saved", "dense / transformers"]
INFER_HEAD = [*SHARED, "KV MiB, dense", "KV MiB, skip", "dense / transformers"]
FIGURES = {
    "prefill": "prefill_ms",
    "decode": "decode_ms_per_token",
    "end_to_end": "end_to_end_ms",
}


def size_of(report: dict[str, Any]) -> str:
    """The report's size, and its family where that is not LLaVA."""
    return report["size"] if report["family"] == "llava" else f"{report['size']}, {report['family']}"


def train_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row a region of a training report."""
    rows = []
    for name, region in report["regions"].items():
        peer = region["peers"].get(PEER)
        rows.append(
            [
                size_of(report),
                name,
                f"{region['dense']['step_ms']:.1f}",
                f"{region['skip']['step_ms']:.1f}",
                f"{region['time_saved']:.1%}",
                f"{region['flops_saved']:.1%}",
                f"{region['time_saved_per_flops_saved']:.1%}",
                f"{region['cpu_time_saved']:.1%}",
                f"{peer['dense_over_peer']:.3f}" if peer else "-",
            ]
        )
    return rows


def infer_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row a region of an inference report."""
    rows = []
    for name, region in report["regions"].items():
        peer = report["peers"].get(PEER)
        rows.append(
            [
                size_of(report),
                name,
                f"{report['dense'][FIGURES[name]]:.2f}",
                f"{report['skip'][FIGURES[name]]:.2f}",
                f"{region['time_saved']:.1%}",
                f"{region['flops_saved']:.1%}",
                f"{report['dense']['kv_bytes'] / 2**20:.2f}",
                f"{report['skip']['kv_bytes'] / 2**20:.2f}",
                f"{peer['dense_over_peer'][name]:.3f}" if peer else "-",
            ]
        )
    return rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(reports: list[dict[str, Any]]) -> str:
    """Both tables, and on what they were measured."""
    train = [row for report in reports if "kv_saved" not in report for row in train_rows(report)]
    infer = [row for report in reports if "kv_saved" in report for row in infer_rows(report)]
    parts = []
    if train:
        parts += ["Training step (forward and backward)", "", markdown(TRAIN_HEAD, train), ""]
    if infer:
        parts += ["Answer", "", markdown(INFER_HEAD, infer), ""]
    seen = {", ".join(f"{key} {value}" for key, value in report["environment"].items()): None for report in reports}
    return "\n".join([*parts, *seen])


def main(argv: list[str]) -> int:
    """`python -m llava_sv.bench.table report.json ...`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m llava_sv.bench.table report.json [report.json ...]")
        return 0 if argv else 2
    reports = []
    for name in argv:
        try:
            reports.append(json.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{name}: cannot be read as a report ({error}); make it with llava-sv bench") from error
    print(render(reports))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
