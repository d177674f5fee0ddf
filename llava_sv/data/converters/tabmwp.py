"""TabMWP's `problems_train.json`, arithmetic over pictures of tables: `tabmwp`. Called through `get_converter`.

{number: {question, unit, choices, answer, solution, ...}}; the picture is `NUMBER.png`. Option `answer`: `solution`
(the default: the worked solution) or `answer` (the final answer alone, for a word or phrase).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_sv.data.converters import prompts, read
from llava_sv.data.converters.attempt import attempt, text
from llava_sv.data.converters.items import Inputs, Item, conversation


def tabmwp(inputs: Inputs) -> Iterator[Item]:
    """A record for each problem."""
    for path in inputs.files:
        for number, line, problem in read.members(path):
            yield attempt(f"{path} line {line}: problem {number}", _record, inputs, number, problem)


def _record(inputs: Inputs, number: str, problem: Any) -> dict[str, Any]:
    field = inputs.option("answer", "solution")
    question, answer = text(problem, "question"), text(problem, field)
    if problem.get("unit"):
        question += f" (unit: {problem['unit']})"
    if problem.get("choices"):
        question += "\nOptions: " + ", ".join(problem["choices"])
    if field == "answer":
        question = prompts.short(question)
    return conversation(f"{inputs.source.name}/{number}", [(question, answer)], [inputs.image(f"{number}.png")])
