"""The card's table of other token budgets on the same weights, from `llava-sv analyze tradeoff --json`.

A report arrives; markdown leaves. Called by `card`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sv.data.toy_questions import FINE_DETAIL
from llava_sv.errors import UserError
from llava_sv.release.card_eval import Own, held_against
from llava_sv.release.card_format import count, mapping, numeric, percent, ratio, table
from llava_sv.release.card_sources import Report

FIGURES = ("accuracy", "flops_ratio", "kv_ratio", "visual_tokens")


def is_tradeoff(values: dict[str, Any]) -> bool:
    """Whether a JSON object is such a report."""
    return isinstance(values.get("rows"), list) and {"checkpoint", "task", "questions"} <= set(values)


def budgets_section(reports: list[Report], checkpoint: Path, own: Own) -> list[str]:
    """A table of each report; none without."""
    return [line for report in reports for line in _table(report, checkpoint, own)]


def _table(report: Report, checkpoint: Path, own: Own) -> list[str]:
    values, where = report.values, str(report.path)
    known = held_against(report.path, values["checkpoint"], values.get("identity"), checkpoint, own)
    rows = []
    for number, one in enumerate(values["rows"], 1):
        place = f"{where}: row {number}"
        if not isinstance(one, dict) or numeric(one, "accuracy", place) is None:
            raise UserError(f"{place} has no accuracy; give the JSON that llava-sv analyze tradeoff writes")
        share, flops, cache, tokens = (numeric(one, name, place) for name in FIGURES)
        fine = numeric(mapping(one, "per_category", place), FINE_DETAIL, place)
        rows.append(
            (
                f"{one.get('budget')}" + (" (as trained)" if one.get("trained_so") else ""),
                "-" if tokens is None else count(tokens),
                percent(share or 0.0),
                "-" if fine is None else percent(fine),
                "-" if flops is None else ratio(flops),
                "-" if cache is None else ratio(cache),
            )
        )
    head = ("budget", "visual tokens", "accuracy", "of it fine detail", "FLOPs / dense", "KV cache / dense")
    asked = f"{count(numeric(values, 'questions', where) or 0)} questions of {values['task']}"
    return [
        f"Other budgets on these weights, without training again: {asked} (of this checkpoint: {known}). FLOPs are of "
        "a prefill, counted; the cache is measured.",
        "",
        *table(head, rows),
    ]
