"""The part of the model zoo's page that holds the estimate against hours that are known.

`zoo_cost.checks` arrives, paragraphs and tables leave. Called by `zoo_page`.
"""

from __future__ import annotations

from typing import Any

from llava_sv.bench.cells import markdown, percent
from llava_sv.release.zoo_recipes import DEVICES

Table = tuple[list[str], list[list[str]]]
"""A head and lines."""


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{round(100 * value) or 0:+d}%"


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def checks_section(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The page's section on how far the estimate holds, paragraph by paragraph."""
    gpu_hours = DEVICES * found["dense"][0]["mfu"]
    shares = [row["papers_share"] for row in found["skipping"]]
    return [
        "## How far the estimate holds",
        "The paper gives hours of SFT on LLaVA-665K and calls them GPU hours. On one A100, LLaVA's would be "
        f"{gpu_hours:.0%} of the peak; so they are read as wall-clock hours of {DEVICES}, which its appendix names for "
        "that data. What its dense runs imply:",
        markdown(*_dense_table(found["dense"])),
        "HFU counts what gradient checkpointing runs again as well. With one MFU for all families the last column "
        "would be the error: longer sequences run closer to the peak. So each family is calibrated by its own dense "
        "run; other people's hours for LLaVA-1.5's recipe on 8 A100s, which had no part in that:",
        markdown(*_reported_table(found["reported"])),
        "The skipping rows are a test. From the dense run's hours: by FLOPs alone; with the share of the FLOPs saved "
        "that became time on a CPU here ([Benchmarks.md](Benchmarks.md)); with the share that became time in the "
        "paper's other run of the family. Last, the share that became time in this one:",
        markdown(*_skipping_table(found["skipping"])),
        f"The paper took longer than its FLOPs ask for: {min(shares):.0%} to {max(shares):.0%} of what it saves became "
        "time. What does not shrink with the tokens is the likely rest: loading data, ZeRO's communication, the "
        "optimizer. This project's own share on GPUs is not measured yet; expect a run between the hours above and the "
        "paper's.",
        "With more data, from the paper's hours for the same model on fewer records, by their number:",
        markdown(*_data_table(found["data"])),
    ]


def _dense_table(rows: list[dict[str, Any]]) -> Table:
    head = ["checkpoint", "the paper's hours", "MFU", "HFU", "hours by LLaVA's MFU", "error"]
    return head, [
        [
            f"`{row['name']}`",
            f"{row['paper_hours']:g}",
            percent(row["mfu"]),
            percent(row["hfu"]),
            _hours(row["hours_by_first"]),
            _signed(row["error"]),
        ]
        for row in rows
    ]


def _reported_table(rows: list[dict[str, Any]]) -> Table:
    head = ["recipe", "stage", "reported by", "hours", "estimate", "error"]
    return head, [
        [
            f"LLaVA-1.5, {row['decoder']}",
            {"sft": "SFT", "pretrain": "pretraining"}[row["trains"]],
            row["source"],
            f"{row['hours']:g}",
            _hours(row["estimate"]),
            _signed(row["error"]),
        ]
        for row in rows
    ]


def _skipping_table(rows: list[dict[str, Any]]) -> Table:
    head = ["checkpoint", "the paper's hours", "FLOPs of dense", "by FLOPs alone", "error", "with the share here"]
    head += ["error", "with the other run's share", "error", "the paper's own share"]
    lines = []
    for row in rows:
        estimates = [
            text
            for way in ("", "_by_share", "_by_other")
            for text in (_hours(row.get(f"hours{way}")), _signed(row.get(f"error{way}")))
        ]
        first = [f"`{row['name']}`", f"{row['paper_hours']:g}", percent(row["flops_of_dense"])]
        lines.append([*first, *estimates, percent(row["papers_share"])])
    return head, lines


def _data_table(rows: list[dict[str, Any]]) -> Table:
    head = ["checkpoint", "from", "the paper's hours", "estimate", "error"]
    return head, [
        [
            f"`{row['name']}`",
            f"`{row['from']}`",
            f"{row['paper_hours']:g} on {row['gpus']}",
            _hours(row["hours"]),
            _signed(row["error"]),
        ]
        for row in rows
    ]
