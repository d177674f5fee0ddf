"""PlotQA's question file, of many millions: `plotqa`. Called through `get_converter`.

{qa_pairs: [{image_index, question_string, answer, ...}]}, a picture's questions one after the other; they become one
conversation. Option `most`: of more questions than that, so many evenly spaced ones are taken (20).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from llava_sv.data.converters import prompts
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.json_stream import read_members


def plotqa(inputs: Inputs) -> Iterator[Item]:
    """A record for each picture."""
    most, image = inputs.option("most", 20), inputs.option("image", "{id}.png")
    for path in inputs.files:
        for index, group in groupby(read_members(path, "qa_pairs"), key=lambda member: _picture(member[2])):
            members = list(group)
            good = []
            for line, _, entry in members:
                try:
                    good.append((prompts.short(entry["question_string"]), _answer(entry["answer"])))
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    problem = f"has no {error}" if isinstance(error, KeyError) else str(error)
                    yield Item(f"{path} line {line}", problem=problem)
            if index is None:
                yield from (Item(f"{path} line {line}", problem="has no 'image_index'") for line, _, _ in members[: len(good)])
            elif good:
                where = f"{path} line {members[0][0]}: picture {index}"
                name = inputs.image(image.replace("{id}", str(index)))
                yield Item(where, conversation(f"{inputs.source.name}/{index}", spaced(good, most), [name]))


def spaced(values: list[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly spaced, the first among them."""
    if len(values) <= most:
        return values
    return [values[index * len(values) // most] for index in range(most)]


def _picture(entry: Any) -> Any:
    return entry.get("image_index") if isinstance(entry, dict) else None


def _answer(answer: Any) -> str:
    """A number is written without its binary tail, a list by its parts."""
    if isinstance(answer, list) and answer:
        return ", ".join(_answer(part) for part in answer)
    if isinstance(answer, float):
        return f"{answer:.6g}" if abs(answer) < 1e6 else str(round(answer, 2)).removesuffix(".0")
    if answer is None or not str(answer).strip():
        raise ValueError("has an empty 'answer'")
    return str(answer)
