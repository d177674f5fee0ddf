"""ArXivQA's JSONL: multiple-choice questions about figures, whose options were written in many ways: `arxivqa`. Called
through `get_converter`.

{id, image, question, options: ["A) ...", ...], label: "B", rationale}. The options' own letters are taken off, and put
before them again in the one way of all sources; the label is read by its letter or by the option's words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import Any

from llava_sv.data.converters import prompts, read
from llava_sv.data.converters.attempt import attempt
from llava_sv.data.converters.items import Inputs, Item, conversation

_LETTER = re.compile(r"\s*(?:-\s*)?\(?([A-Z])(?:[.):]+\s*|\s*$)")


def arxivqa(inputs: Inputs) -> Iterator[Item]:
    """A record for each line."""
    for path in inputs.files:
        for where, entry in read.entries(path):
            yield attempt(where, _record, inputs, entry)


def _record(inputs: Inputs, entry: Any) -> dict[str, Any]:
    texts = options_of(entry["options"])
    exchange = prompts.choices(entry["question"], texts, label_of(entry["label"], entry["options"], texts))
    return conversation(f"{inputs.source.name}/{entry['id']}", [exchange], [inputs.image(entry["image"])])


def options_of(options: Any) -> list[str]:
    """The options without the letters before them, where each has its own; dividers and blanks are no options."""
    options = [option.strip() for option in options if option.strip(" -")]
    if len(options) < 2:
        raise ValueError(f"{len(options)} options are no choice")
    found = [_LETTER.match(option) for option in options]
    if all(match and match[1] == letter for match, letter in zip(found, string.ascii_uppercase)):
        return [option[match.end() :].strip() or match[1] for option, match in zip(options, found) if match]
    return options


def label_of(label: Any, options: list[str], texts: list[str]) -> int:
    """The index of the option that the label means."""
    label = label.strip()
    given = [option.strip() for option in options if option.strip(" -")]
    for known in (given, texts):
        if label in known:
            return known.index(label)
    match = _LETTER.match(label)
    letters = {match[1]} if match is not None else set(re.findall(r"\b[A-Z]\b", label))
    # options that have letters of their own, though not A, B, C, ..., are meant by these
    own = [found[1] for option in given if (found := _LETTER.match(option))]
    if len(own) < len(given):
        own = list(string.ascii_uppercase[: len(texts)])
    if len(letters) == 1 and own.count(letter := letters.pop()) == 1:
        return own.index(letter)
    raise ValueError(f"label {label!r} is none of the {len(texts)} options")
