"""Figures as text: shares, Markdown tables, on what was measured. Called by every page that `llava_sv.bench` writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def percent(value: float | None) -> str:
    """`0.123` -> `12.3%`; a dash for what there is not."""
    return "-" if value is None else f"{value:.1%}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def in_one_line(environment: dict[str, Any]) -> str:
    """`clock.environment`, for a terminal or below a table."""
    return ", ".join(f"{key} {value}" for key, value in environment.items())
