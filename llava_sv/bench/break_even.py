"""From which point on skipping is the faster one: medians or points of a curve in, a sentence's worth out.

Called by `bench infer` (over the answer's length) and `bench sweep` (over whatever was varied). Plain arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

ALWAYS, NEVER, FROM, UP_TO, MIXED = "always", "never", "from", "up to", "mixed"


def of_answer(prefill_gain_ms: float, decode_gain_ms: float) -> dict[str, Any]:
    """Where an answer's end to end is faster. Gains: milliseconds that skipping saves before the first token, and at
    each further one; negative where it costs.

    An answer of n tokens gains `prefill + (n - 1) decode`. Returns {"when", "new_tokens"}: `always` from the first
    token on, `never`, `from` so many tokens on, or `up to` so many.
    """
    if prefill_gain_ms > 0 and decode_gain_ms >= 0:
        return {"when": ALWAYS, "new_tokens": None}
    if prefill_gain_ms <= 0 and decode_gain_ms <= 0:
        return {"when": NEVER, "new_tokens": None}
    crossing = 1 - prefill_gain_ms / decode_gain_ms
    if decode_gain_ms > 0:
        return {"when": FROM, "new_tokens": math.floor(crossing) + 1}
    return {"when": UP_TO, "new_tokens": math.ceil(crossing) - 1}


def of_curve(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Where a curve of (what was varied, share of time saved) is above zero, by straight lines between its points.

    Returns {"when", "at", "least", "most"}: `at` is the crossing, for `from` and `up to`; `least` and `most` are the
    range that was measured, to which `always` and `never` hold; `mixed` where it crosses more than once.
    """
    curve = sorted(points)
    signs = [saved > 0 for _, saved in curve]
    found: dict[str, Any] = {"at": None, "least": curve[0][0], "most": curve[-1][0]}
    turns = [index for index in range(1, len(curve)) if signs[index] != signs[index - 1]]
    if not turns:
        return {"when": ALWAYS if signs[0] else NEVER, **found}
    if len(turns) > 1:
        return {"when": MIXED, **found}
    (x0, y0), (x1, y1) = curve[turns[0] - 1], curve[turns[0]]
    at = x0 + (x1 - x0) * y0 / (y0 - y1)
    return {"when": FROM if signs[-1] else UP_TO, **found, "at": at}


def in_words(found: dict[str, Any], what: str = "new tokens") -> str:
    """`of_answer`'s or `of_curve`'s result as part of a sentence."""
    at = found.get("new_tokens", found.get("at"))
    within = f" in this range ({found['least']:g} to {found['most']:g} {what})" if "least" in found else ""
    if found["when"] in (ALWAYS, NEVER):
        return found["when"] + (within or {ALWAYS: ", from the first token on", NEVER: ", however long"}[found["when"]])
    if found["when"] == MIXED:
        return f"sometimes{within}"
    return f"{found['when']} {at:.0f} {what}{' on' if found['when'] == FROM else ''}"
