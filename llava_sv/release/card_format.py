"""How the model card writes numbers, paths and tables: each kind of number in one way, here only.

Values arrive, text leaves; what is not there becomes `NOT_RECORDED` and is noted by the `Book`. Called by `card` and
its sections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_sv.errors import UserError

NOT_RECORDED = "not recorded"

_ABSOLUTE = re.compile(r"(?<![\w/.:~-])(?:~|\.{1,2}|[A-Za-z]:)?[/\\]{1,2}(?:[^\s,;:|'\"()]+)")
"""An absolute path, or one that leaves the working folder, in a text; no part of a web address."""


@dataclass
class Book:
    """What a card could not say, in the order in which it came up."""

    missing: list[str] = field(default_factory=list)

    def say(self, what: str, value: Any, write: Callable[[Any], str] = str) -> str:
        """`value` as `write` has it; where it is None, `NOT_RECORDED`, and `what` is noted as missing."""
        if value is not None:
            return write(value)
        self.lacks(what)
        return NOT_RECORDED

    def lacks(self, what: str) -> None:
        """Note `what` as missing, once."""
        if what not in self.missing:
            self.missing.append(what)


def count(value: float) -> str:
    """1234567 -> `1,234,567`."""
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """0.9139 -> `91.4%`."""
    return f"{100 * share:.1f}%"


def interval(low: float, high: float) -> str:
    """Two shares -> `88.0% to 93.9%`."""
    return f"{percent(low)} to {percent(high)}"


def ratio(value: float) -> str:
    """One figure over another -> `0.327`."""
    return f"{value:.3f}"


def points(difference: float) -> str:
    """The difference of two shares -> `-1.7 points`."""
    return f"{100 * difference:+.1f} points"


def mean(value: float) -> str:
    """A mean of whole numbers, or a rate: `63.8`, `16,421.7`."""
    return f"{value:,.1f}"


def loss(value: float) -> str:
    """`0.1713`."""
    return f"{value:.4f}"


def milliseconds(value: float) -> str:
    """`6.17 ms`."""
    return f"{value:,.2f} ms"


def seconds(value: float) -> str:
    """Seconds, minutes or hours, as a person would say it: `6.5 min`."""
    if value < 120:
        return f"{value:,.1f} s"
    return f"{value / 60:,.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"


def hours(value: float) -> str:
    """Hours of devices: `79.2`, or `0.108` where there are few."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"


def size_of(value: float) -> str:
    """Bytes -> `196.0 KiB`, `1.5 MiB` or `79.2 GiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if value >= 2**power:
            return f"{value / 2**power:,.1f} {unit}"
    return f"{value / 2**10:,.1f} KiB"


def flops(value: float) -> str:
    """`1.24 GFLOP`, or more of them in tera."""
    return f"{value / 1e12:,.2f} TFLOP" if value >= 1e12 else f"{value / 1e9:,.3g} GFLOP"


def number(value: float) -> str:
    """A number of no particular kind, as short as it goes: `0.0005`, `2`, `1e-05`."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def plain(value: Any) -> str:
    """A setting's value: numbers short, paths shortened, mappings as `name value`, nothing as `-`."""
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value) if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(item)}" for name, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return without_paths(str(value))


def short(path: str) -> str:
    """The last two parts of an absolute path, or of one that leaves the working folder; other paths as they are."""
    if not re.match(r"^(~|\.{1,2}|[A-Za-z]:)?[/\\]", path) and not path.startswith(("~", "..")):
        return path
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~") and not part.endswith(":")]
    return "/".join(parts[-2:])


def without_paths(text: str) -> str:
    """A text in which no path tells of a machine: each is `short`."""
    return _ABSOLUTE.sub(lambda found: short(found[0]), text)


def cell(text: str) -> str:
    """A text that breaks no table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table, an empty one after it. `ValueError` for a row of another width."""
    lines = ["| " + " | ".join(map(cell, head)) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(head)}: {row}")
        lines.append("| " + " | ".join(map(cell, row)) + " |")
    return [*lines, ""]


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    some = list(words)
    return ", ".join(some[:-1]) + f" and {some[-1]}" if len(some) > 1 else "".join(some)


def numeric(values: Any, name: str, where: str) -> float | None:
    """`values[name]` where it is a number, None where it is absent or null; `UserError` for anything else."""
    value = values.get(name) if isinstance(values, Mapping) else None
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise UserError(f"{where}: {name} is {value!r}, not a number; take the file as it was written")


def mapping(values: Any, name: str, where: str) -> dict[str, Any]:
    """`values[name]` where it is an object, `{}` where it is absent or null; `UserError` for anything else."""
    value = values.get(name) if isinstance(values, Mapping) else None
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    raise UserError(f"{where}: {name} is {value!r}, not an object; take the file as it was written")
