"""IconQA as published: a folder a problem, TASK/ID/ with data.json, image.png and, where the choices are pictures,
these. Called through `get_converter`.

data.json: {question, answer, choices}. Of `choose_txt` the choices are texts, of `choose_img` names of pictures, and
the answer is the right one's index; `fill_in_blank` has no choices, its answer is a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters import prompts
from llava_sv.data.converters.attempt import attempt
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.read import document
from llava_sv.data.converters.values import EntryError, choice_of, lookup, text_of

PICTURES = (".png", ".jpg")


def iconqa(inputs: Inputs) -> Iterator[Item]:
    """A record a problem."""
    for path in inputs.files:
        yield attempt(str(path), _record, inputs, path, document(path))


def _record(inputs: Inputs, path: Path, problem: Any) -> dict[str, Any]:
    if not isinstance(problem, dict):
        raise EntryError("expected an object with question and answer")
    folder = inputs.relative(path.parent)
    identity = f"{inputs.source.name}/{path.parent.parent.name}/{path.parent.name}"
    images = [f"{folder}/image.png"]
    question = text_of(lookup(problem, "question")).strip()
    answer = lookup(problem, "answer")
    options = problem.get("choices")
    if options is None:
        answer = text_of(answer).strip()
        if not answer:
            raise EntryError("has no answer")
        return conversation(identity, [(prompts.short(question), answer)], images)
    if not isinstance(options, list) or not options:
        raise EntryError("field 'choices' holds no options")
    options = [text_of(option) for option in options]
    right = choice_of(answer, options)
    if all(option.lower().endswith(PICTURES) for option in options):
        images += [f"{folder}/{option}" for option in options]
        options = [f"image {number}" for number in range(2, len(options) + 2)]
    return conversation(identity, [prompts.choices(question, options, right)], images)
