"""The page of `gpu_check`: its report and the files beside it in, Markdown out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llava_sv.bench.cells import in_one_line, markdown, percent
from llava_sv.constants import GIB


def render(report: dict[str, Any], folder: Path) -> str:
    """Machine, rows, parity, figures; parts that are not there are left out."""
    machine, took = in_one_line(report["environment"]), f"{report['seconds']:.0f} s of {60 * report['minutes']:.0f}."
    parts = ["# GPU check", "", machine, "", took, ""]
    parts += [markdown(["row", "status", "seconds", ""], _rows(report)), ""]
    found = {row["name"]: _read(folder / row["file"]) for row in report["rows"] if row.get("file")}
    parity, memory = found.pop("parity", None), found.pop("memory", None)
    parts += _parity(parity) if parity else []
    benches = [value for name, value in found.items() if value and name.split(",")[0] in ("train", "infer")]
    if benches:
        head = ["what", "time saved", "FLOPs saved", "time / FLOPs", "peak GiB, dense", "peak GiB, skip"]
        parts += ["## Saved", "", markdown(head, [line for one in benches for line in _saved(one)]), ""]
        parts += ["## Figures", "", _tables(benches), ""]
    return "\n".join([*parts, *(_memory(memory) if memory else [])]).rstrip() + "\n"


def _rows(report: dict[str, Any]) -> list[list[str]]:
    return [
        [row["name"], row["status"], f"{row['seconds']:.0f}", row["note"].replace("|", "\\|")] for row in report["rows"]
    ]


def _read(path: Path) -> Any:
    """A JSON file that a process which was stopped may not have written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _parity(parity: dict[str, Any]) -> list[str]:
    """Checks by kernel and precision: how many passed, and how near the nearest came to its limit."""
    results = parity["results"]
    rows = []
    for dtype, kernel in dict.fromkeys((one["dtype"], one["kernel"]) for one in results):
        own = [one for one in results if (one["dtype"], one["kernel"]) == (dtype, kernel)]
        counts = Counter(one["status"] for one in own)
        shares = [one["error"] / one["limit"] for one in own if one["error"] is not None and one["limit"]]
        most = f"{max(shares):.0%}" if shares else "-"
        rows.append([dtype, kernel, *(str(counts[status]) for status in ("ok", "failed", "unavailable")), most])
    head = ["precision", "attention kernel", "ok", "failed", "unavailable", "largest error of its limit"]
    bad = [one for one in results if one["status"] == "failed"]
    lines = [f"- failed: {one['check']}, {one['family']}, {one['dtype']}, {one['kernel']} {_why(one)}" for one in bad]
    return ["## Parity", "", markdown(head, rows), "", *lines, *([""] if lines else [])]


def _why(result: dict[str, Any]) -> str:
    if result["error"] is None:
        return f"({result['note']})"
    return f"({result['of']}: {result['error']:.2e}, {result['limit']:.2e} allowed)"


def _saved(report: dict[str, Any]) -> list[list[str]]:
    """A line a region of one benchmark's report."""
    name = ", ".join(filter(None, [report["size"], report["family"], report.get("slice")]))
    lines = []
    for region, figures in report["regions"].items():
        time_saved, flops_saved = figures["time_saved"], figures["flops_saved"]
        ratio = time_saved / flops_saved if flops_saved else None
        sides = figures if "dense" in figures else report
        peaks = [sides[side].get("peak_bytes") for side in ("dense", "skip")]
        cells = ["-" if peak is None else f"{peak / GIB:.3g}" for peak in peaks]
        lines.append([f"{name}, {region}", percent(time_saved), percent(flops_saved), percent(ratio), *cells])
    return lines


def _tables(reports: list[dict[str, Any]]) -> str:
    """The benchmarks' own tables; a report of another shape must not lose the page."""
    from llava_sv.bench.table import render as render_tables

    try:
        return render_tables(reports)
    except (KeyError, TypeError, ValueError) as error:
        return f"The tables cannot be made of these reports ({type(error).__name__}: {error})."


def _memory(memory: dict[str, Any]) -> list[str]:
    """Planned over measured memory."""
    ratios = [row["ratio"] for row in memory["rows"]]
    if not ratios:
        return []
    line = f"Planned over measured peak of {len(ratios)} small runs: {min(ratios):.3f} to {max(ratios):.3f}."
    return ["## Memory plan", "", line, ""]
