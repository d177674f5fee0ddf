"""Questions about drawn scenes and figures, in JSON objects of up to millions of questions, read one by one: CLEVR and
its kin, FigureQA. Files arrive, records leave.

Options (defaults in brackets):
    entries                 the key of the list of questions
    image                   a template of the picture's name, such as {split}/{image_filename}
    question [{question}]   a template of the question
    answer   [answer]       the answer's field
    answers  [{}]           answers as published: as they are to be said, such as 0: No (truth values are Yes and No)
    per      [question]     one record a question, or one a picture, `image`, with all its questions
    below    [{}]           field: number; entries at or above it are left out (the other splits of one file)

The instruction to answer shortly stands once in a conversation, after its first question.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_sv.data.converters.fields import text_of
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.prompts import short
from llava_sv.data.converters.read import members


class Asked(NamedTuple):
    """One question; `place` says where it stands."""

    place: str
    image: str
    question: str
    answer: str


def scene_questions(inputs: Inputs) -> Iterator[Item]:
    """One record a question or picture. By picture, one file's questions are held until it is read to its end."""
    by_image = inputs.option("per", "question") == "image"
    for path in inputs.files:
        groups: dict[str, list[Asked]] = {}
        for number, (place, entry) in enumerate(members(path, inputs.option("entries"))):
            try:
                if not _wanted(entry, inputs.option("below", {})):
                    continue
                asked = _asked(inputs, place, entry)
            except KeyError as error:
                yield Item(place, problem=f"has no field {error.args[0]!r}")
            except (TypeError, ValueError, IndexError, AttributeError) as error:
                yield Item(place, problem=str(error))
            else:
                if by_image:
                    groups.setdefault(asked.image, []).append(asked)
                else:
                    yield _item(inputs, f"{path.stem}-{number}", [asked])
        for image, group in groups.items():
            yield _item(inputs, f"{path.stem}-{Path(image).stem}", group)


def _wanted(entry: Any, below: dict[str, float]) -> bool:
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, expected an object")
    return all(entry[field] < limit for field, limit in below.items())


def _asked(inputs: Inputs, place: str, entry: dict[str, Any]) -> Asked:
    question = str(inputs.option("question", "{question}")).format_map(entry).strip()
    image = str(inputs.option("image")).format_map(entry)
    value = entry[inputs.option("answer", "answer")]
    if value is None or isinstance(value, list | dict):
        raise ValueError(f"its answer is {type(value).__name__}, expected text or a number")
    answers = {str(given): str(said) for given, said in inputs.option("answers", {}).items()}
    answer = text_of(value).strip()
    if answers:
        if answer not in answers:
            raise ValueError(f"its answer is {answer!r}, expected one of {', '.join(answers)}")
        answer = answers[answer]
    if not question or not answer:
        raise ValueError("has an empty question or answer")
    return Asked(place, image, question, answer)


def _item(inputs: Inputs, identity: str, group: list[Asked]) -> Item:
    exchanges = [(asked.question, asked.answer) for asked in group]
    exchanges[0] = (short(exchanges[0][0]), exchanges[0][1])
    return Item(group[0].place, conversation(identity, exchanges, [inputs.image(group[0].image)]))
