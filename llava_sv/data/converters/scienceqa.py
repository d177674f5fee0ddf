"""ScienceQA's `problems.json`: multiple-choice questions, with or without a picture: `scienceqa`. Called through
`get_converter`.

{number: {question, choices, answer (from 0), hint, image (a file's name, or null), split, ...}}; pictures lie in
`SPLIT/NUMBER/IMAGE`. Options: `splits` (default: [train]), `pictures_only` (default: false).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_sv.data.converters import prompts, read
from llava_sv.data.converters.attempt import attempt
from llava_sv.data.converters.items import Inputs, Item, conversation


def scienceqa(inputs: Inputs) -> Iterator[Item]:
    """A record for each question of the wanted splits."""
    splits, pictures_only = inputs.option("splits", ["train"]), bool(inputs.option("pictures_only", False))
    for path in inputs.files:
        for number, line, problem in read.members(path):
            if isinstance(problem, dict):
                wanted = problem.get("split", splits[0]) in splits and (problem.get("image") or not pictures_only)
                if not wanted:
                    continue
            yield attempt(f"{path} line {line}: question {number}", _record, inputs, number, problem)


def _record(inputs: Inputs, number: str, problem: dict[str, Any]) -> dict[str, Any]:
    hint = (problem.get("hint") or "").strip()
    question = f"Context: {hint}\n{problem['question']}" if hint else problem["question"]
    exchange = prompts.choices(question, problem["choices"], problem["answer"])
    images = []
    if problem.get("image"):
        images.append(inputs.image(f"{problem['split']}/{number}/{problem['image']}"))
    return conversation(f"{inputs.source.name}/{number}", [exchange], images)
