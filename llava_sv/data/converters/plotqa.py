"""PlotQA's question file, of many millions: `plotqa`. Called through `get_converter`.

{qa_pairs: [{image_index, question_string, answer, ...}]}, a picture's questions one after the other; they become one
conversation. Option `most`: of more questions than that, so many evenly spaced ones are taken (20).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from llava_sv.data.converters import prompts, read
from llava_sv.data.converters.items import Inputs, Item, conversation


def plotqa(inputs: Inputs) -> Iterator[Item]:
    """A record for each picture; one without a damaged question, where there is one."""
    most, image = inputs.option("most", 20), inputs.option("image", "{id}.png")
    for path in inputs.files:
        for index, group in groupby(read.elements(path, "qa_pairs"), key=lambda element: _picture(element[2])):
            exchanges, first = [], ""
            for where, _, entry in group:
                first = first or where
                try:
                    exchanges.append(_exchange(entry))
                except ValueError as error:
                    yield Item(where, problem=str(error))
            if exchanges:
                exchanges[0] = (prompts.short(exchanges[0][0]), exchanges[0][1])
                name = inputs.image(image.replace("{id}", str(index)))
                yield Item(first, conversation(f"{inputs.source.name}/{index}", spaced(exchanges, most), [name]))


def _exchange(entry: Any) -> tuple[str, str]:
    for name in ("image_index", "question_string", "answer"):
        if not isinstance(entry, dict) or entry.get(name) in (None, "", []):
            raise ValueError(f"has no {name!r}")
    return str(entry["question_string"]), _answer(entry["answer"])


def spaced(values: list[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly spaced, the first among them."""
    if len(values) <= most:
        return values
    return [values[index * len(values) // most] for index in range(most)]


def _picture(entry: Any) -> Any:
    return entry.get("image_index") if isinstance(entry, dict) else None


def _answer(answer: Any) -> str:
    """A number is written without its binary tail, a list by its parts."""
    if isinstance(answer, list):
        return ", ".join(_answer(part) for part in answer)
    if isinstance(answer, float):
        return f"{answer:.6g}" if abs(answer) < 1e6 else str(round(answer, 2)).removesuffix(".0")
    return str(answer)
