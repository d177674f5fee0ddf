"""Reports of `bench train` and `bench infer` in; rows of docs/Benchmarks.md out.

`scripts/bench_cpu.sh` and `scripts/gpu_check.sh` show them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llava_sv.bench import break_even
from llava_sv.bench.cells import in_one_line, markdown, percent
from llava_sv.bench.split import PARTS
from llava_sv.errors import UserError, exit_on_user_error

SHARED = [
    "size",
    "batch",
    "text",
    "visual",
    "region",
    "dense ms",
    "skip ms",
    "time saved",
    "FLOPs saved",
    "time / FLOPs",
]
TRAIN_HEAD = [*SHARED, "CPU time saved", "MFU dense", "MFU skip", "dense / transformers"]
INFER_HEAD = [*SHARED, "KV MiB, dense", "KV MiB, skip", "dense / transformers"]
SPLIT_HEAD = ["size", "", *(part.replace("_", " ") for part in PARTS), "whole ms", "peak MiB"]
LENGTH_HEAD = ["size", "batch", "text", "visual", "new tokens", "dense ms", "skip ms", "time saved", "FLOPs saved"]
FIGURES = {"prefill": "prefill_ms", "decode": "decode_ms_per_token", "end_to_end": "end_to_end_ms"}
"""Region of an answer -> the figure that it is measured by."""


def size_of(report: dict[str, Any]) -> str:
    """The report's size, its family where that is not LLaVA, and how much of the model it is."""
    family = None if report["family"] == "llava" else report["family"]
    return ", ".join(filter(None, [report["size"], family, report.get("slice")]))


def setting_of(report: dict[str, Any]) -> list[str]:
    """Batch, text tokens, and visual tokens as `retained + skipped`; dashes for a report that does not say."""
    asked = report.get("settings")
    if asked is None:
        return ["-"] * 3
    return [str(asked["batch"]), str(asked["text_tokens"]), f"{asked['num_retained']} + {asked['num_skipped']}"]


def over_peer(peers: dict[str, Any], region: str | None = None) -> str:
    """Dense over the outside control, where there is one in this region."""
    ratios = [peer["dense_over_peer"] for peer in peers.values()]
    ratios = [ratio.get(region) for ratio in ratios] if region else ratios
    return next((f"{ratio:.3f}" for ratio in ratios if ratio is not None), "-")


def shares_of(region: dict[str, Any]) -> list[str]:
    """Time saved, FLOPs saved, and the one over the other."""
    return [percent(region.get(key)) for key in ("time_saved", "flops_saved", "time_saved_per_flops_saved")]


def train_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row a region of a training report."""
    rows = []
    for name, region in report["regions"].items():
        rows.append(
            [
                size_of(report),
                *setting_of(report),
                name,
                f"{region['dense']['step_ms']:.1f}",
                f"{region['skip']['step_ms']:.1f}",
                *shares_of(region),
                percent(region["cpu_time_saved"]),
                *(percent(region[who].get("mfu")) for who in ("dense", "skip")),
                over_peer(region["peers"]),
            ]
        )
    return rows


def split_rows(report: dict[str, Any]) -> list[list[str]]:
    """Where the time of a whole step goes, one row a contender; nothing of a report without it."""
    split, whole = report.get("split"), report["regions"]["model"]
    if split is None:
        return []
    return [
        [
            size_of(report),
            name,
            *(f"{split[name][f'{part}_ms']:.1f}" for part in (*PARTS, "whole")),
            f"{whole[name]['peak_bytes'] / 2**20:.1f}",
        ]
        for name in ("dense", "skip")
    ]


def infer_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row a region of an inference report."""
    rows = []
    for name, region in report["regions"].items():
        rows.append(
            [
                size_of(report),
                *setting_of(report),
                name,
                f"{report['dense'][FIGURES[name]]:.2f}",
                f"{report['skip'][FIGURES[name]]:.2f}",
                *shares_of(region),
                f"{report['dense']['kv_bytes'] / 2**20:.2f}",
                f"{report['skip']['kv_bytes'] / 2**20:.2f}",
                over_peer(report["peers"], name),
            ]
        )
    return rows


def length_rows(report: dict[str, Any]) -> list[list[str]]:
    """Answers end to end, one row a length."""
    return [
        [
            size_of(report),
            *setting_of(report),
            str(row["new_tokens"]),
            f"{row['dense_ms']:.1f}",
            f"{row['skip_ms']:.1f}",
            *shares_of(row)[:2],
        ]
        for row in report.get("lengths", [])
    ]


def kv_in_words(check: dict[str, Any]) -> str:
    """`check_kv`'s result as a sentence."""
    kept = f"{check['kept_tokens']} of {check['all_tokens']} tokens are kept"
    if check["equal"]:
        return f"{kept}, and exactly that share of the bytes ({check['bytes_share']:.2%})"
    return f"{kept}, but {check['bytes_share']:.2%} of the bytes: NOT the kept share"


def remarks(report: dict[str, Any]) -> list[str]:
    """Below the tables: what no cell says."""
    name = size_of(report)
    if "kv_check" in report:
        words = break_even.in_words(report["break_even"])
        return [f"{name}: faster end to end {words}; {kv_in_words(report['kv_check'])}."]
    if "split" in report:
        square = report["regions"]["model"]["matmul"]
        left_out = report["split"].get("optimizer_left_out")
        rate = f"{name}: squares of {square['side']} multiply at {square['tflops']:.3g} TFLOP/s"
        return [rate + (f"; {left_out}." if left_out else ".")]
    return []


def environments(reports: list[dict[str, Any]]) -> list[str]:
    """On what they were measured, each once."""
    return list(dict.fromkeys(in_one_line(report["environment"]) for report in reports))


def render(reports: list[dict[str, Any]]) -> str:
    """The tables, and on what they were measured."""
    train = [report for report in reports if "kv_saved" not in report]
    infer = [report for report in reports if "kv_saved" in report]
    parts = []
    for title, head, rows in (
        ("Training step (forward and backward)", TRAIN_HEAD, [row for r in train for row in train_rows(r)]),
        ("Where a whole step's time goes, ms", SPLIT_HEAD, [row for r in train for row in split_rows(r)]),
        ("Answer", INFER_HEAD, [row for r in infer for row in infer_rows(r)]),
        ("Answer, end to end by length", LENGTH_HEAD, [row for r in infer for row in length_rows(r)]),
    ):
        if rows:
            parts += [title, "", markdown(head, rows), ""]
    notes = [f"- {line}" for report in reports for line in remarks(report)]
    return "\n".join([*parts, *notes, *([""] if notes else []), *environments(reports)])


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
