"""Questions and several people's answers in two files, as VQAv2 has them: the files arrive, records leave.

vqa_pairs: files that hold {"questions": [{image_id, question, question_id}]} and files that hold {"annotations":
[{question_id, multiple_choice_answer, answers: [{answer}]}]}, in any order (VQAv2, OK-VQA).
    image          a template of the picture's name, such as COCO_train2014_{image_id:012d}.jpg
    per [image]    one record a picture, with all its questions, or one a `question`

The answer is `multiple_choice_answer`, or what most people said. As in LLaVA-1.5's mixture, the instruction to answer
shortly stands once in a conversation, after its first question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_sv.data.converters.attempt import text
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.prompts import most_common, short
from llava_sv.data.json_stream import read_members
from llava_sv.errors import UserError


def vqa_pairs(inputs: Inputs) -> Iterator[Item]:
    """One record a picture or question; answers without a question are left out, as a test split's are."""
    answers: dict[Any, str] = {}
    asked: list[tuple[str, Any]] = []
    for path in inputs.files:
        known = False
        for number, (key, line, entry) in enumerate(read_members(path)):
            known = known or key in ("questions", "annotations")
            where = f"{path} line {line} entry {number}"
            if key == "questions":
                asked.append((where, entry))
            elif key == "annotations":
                try:
                    answers[entry["question_id"]] = _answer(entry)
                except (KeyError, TypeError, ValueError):
                    yield Item(where, problem="has no question_id with an answer")
        if not known:
            raise UserError(f"{path}: has neither 'questions' nor 'annotations'; expected VQAv2's files, as published")
    yield from _paired(inputs, asked, answers)


def _paired(inputs: Inputs, asked: list[tuple[str, Any]], answers: dict[Any, str]) -> Iterator[Item]:
    template, by_image = inputs.option("image"), inputs.option("per", "image") == "image"
    groups: dict[str, list[tuple[str, str, Any]]] = {}
    places: dict[str, str] = {}
    for where, entry in asked:
        try:
            identity = entry["question_id"]
            if identity not in answers:
                yield Item(where, problem=f"question {identity} has no answer in the annotations")
                continue
            question = text(entry, "question")
            image = template.format_map(entry)
        except KeyError as error:
            yield Item(where, problem=f"has no field {error.args[0]!r}")
            continue
        except (TypeError, ValueError) as error:
            yield Item(where, problem=str(error))
            continue
        group = image if by_image else str(identity)
        places.setdefault(group, where)
        groups.setdefault(group, []).append((question, answers[identity], (identity, image)))
    for group, found in groups.items():
        exchanges = [(short(found[0][0]), found[0][1]), *((question, answer) for question, answer, _ in found[1:])]
        identity, image = found[0][2]
        yield Item(places[group], conversation(identity, exchanges, [inputs.image(image)]))


def _answer(entry: dict[str, Any]) -> str:
    given = entry.get("multiple_choice_answer")
    found = given.strip() if isinstance(given, str) else ""
    return found or most_common([text(one, "answer") for one in entry["answers"]])
