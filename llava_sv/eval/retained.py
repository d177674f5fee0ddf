"""How many tokens images really retained, where `num_retained: auto` lets their content decide.

The answer loop writes each question's counts beside its answer; `summary` reads them back, so that an evaluation that
was stopped and continued counts every question.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_sv.model.token_groups import TokenGroups, TokenRole

FIELD = "retained_tokens"
"""Of a line of the answers file: a count for each of the question's images."""


@contextmanager
def watching(model: Any) -> Iterator[list[int] | None]:
    """A list that grows by one count for each image that the model encodes; None for a model with a fixed budget."""
    skip = model.config.skip_vision
    if skip is None or not skip.adaptive:
        yield None
        return
    counts: list[int] = []

    def note(_module: Any, _inputs: Any, groups: list[TokenGroups]) -> None:
        last = int(skip.last_visual_ffn)  # passes the FFN, but is one of those that were not chosen
        for group in groups:
            skipping = bool((group.roles == int(TokenRole.SKIPPED)).any())
            counts.append(int((group.roles == int(TokenRole.RETAINED)).sum()) - last * skipping)

    hook = model.get_model().mm_projector.register_forward_hook(note)
    try:
        yield counts
    finally:
        hook.remove()


def take(counts: list[int] | None, images: list[list]) -> list[dict[str, Any]]:
    """What each question's line holds besides its answer, and `counts` emptied. images: those of each question."""
    if counts is None:
        return [{} for _ in images]
    lines = []
    for pictures in images:
        lines.append({FIELD: counts[: len(pictures)]})
        del counts[: len(pictures)]
    return lines


def summary(model: Any, answers_file: str | Path) -> dict[str, Any] | None:
    """`budget` (the average that was asked for), and of the images that were shown: how many, and the mean, least and
    most tokens they retained; None for a model with a fixed budget or where none was shown."""
    skip = model.config.skip_vision
    if skip is None or not skip.adaptive:
        return None
    with open(answers_file, encoding="utf-8") as file:
        counts = [count for line in file for count in json.loads(line).get(FIELD, [])]
    if not counts:
        return None
    mean = sum(counts) / len(counts)
    return {
        "budget": skip.mean_retained,
        "images": len(counts),
        "mean": mean,
        "least": min(counts),
        "most": max(counts),
    }
