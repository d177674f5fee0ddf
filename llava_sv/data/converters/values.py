"""Values of one annotation, a dict of whatever fields, by name: looked up, filled into templates, read as words, as one
of several options, as turns. What is wrong is an `EntryError` in words. Called by `fields` and other converters."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Sequence
from typing import Any

Exchange = tuple[str, str]
"""A question and its answer."""

_PAIRS = (("user", "assistant"), ("question", "answer"))
_SPEAKERS = (("from", "value"), ("role", "content"))
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_SLOT = re.compile(r"\{([^{}:]+)(?::(file|stem|0?\d*d|\d+-\d+))?\}")
_MISSING = object()


class EntryError(ValueError):
    """What is wrong with one annotation; the rest of the file goes on."""


def parsed(name: str, value: Any) -> Any:
    """The value that a field's text spells, as JSON or as a Python literal; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise EntryError(f"field {name!r} holds neither JSON nor a literal: {value[:40]!r}") from error


def lookup(entry: Any, name: str, default: Any = _MISSING) -> Any:
    """The value of a dotted name. `EntryError` where there is none, and no default."""
    if isinstance(entry, dict) and name in entry:
        return entry[name]
    value = entry
    parts = name.split(".")
    for index, part in enumerate(parts):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, list) and not part.isdecimal():
            return [lookup(one, ".".join(parts[index:]), default) for one in value]
        elif default is _MISSING:
            raise EntryError(f"has no field {name!r}")
        else:
            return default
    return value


def fill(template: str, entry: dict[str, Any], default: Any = _MISSING) -> Any:
    """The template's text. A field that is absent or null: the default, or `EntryError`."""
    values: list[Any] = [lookup(entry, slot[1], default) for slot in _SLOT.finditer(template)]
    if default is not _MISSING and any(value is None or value == "" for value in values):
        return default
    parts = iter(values)

    def filled(slot: re.Match[str]) -> str:
        value = next(parts)
        if value is None:
            raise EntryError(f"field {slot[1]!r} is empty")
        if slot[2] is None:
            return text_of(value)
        if slot[2].endswith("d"):
            return format(int(value), slot[2])
        if "-" in slot[2]:
            first, last = slot[2].split("-")
            return text_of(value)[int(first) : int(last)]
        name = text_of(value).replace("\\", "/").rsplit("/", 1)[-1]
        return name if slot[2] == "file" else name.rsplit(".", 1)[0]

    return _SLOT.sub(filled, template)


def slots(template: str) -> set[str]:
    """The names in a template."""
    return {slot[1] for slot in _SLOT.finditer(template)}


def text_of(value: Any) -> str:
    """A field's value as words: text, a number, yes or no, a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (int, float)) and value == value:
        return str(value)
    if isinstance(value, list):
        return ", ".join(text_of(one) for one in value)
    if value is None or value != value:
        raise EntryError("a text is missing")
    raise EntryError(f"found an object where text is expected: {value!r}"[:80])


def choice_of(answer: Any, options: Sequence[str], keys: Sequence[str] = (), first: int = 0) -> int:
    """The index of the right one of `options`, which `answer` gives as the option's text, its key, its letter, or a
    number counted from `first`."""
    if not isinstance(answer, bool):
        text = str(answer).strip()
        plain = [option.strip() for option in options]
        if text in keys:
            return list(keys).index(text)
        if isinstance(answer, str) and text in plain:
            return plain.index(text)
        letter = text.strip("().: ").upper()
        if len(letter) == 1 and letter in string.ascii_uppercase and ord(letter) - 65 < len(options):
            return ord(letter) - 65
        if re.fullmatch(r"\d+(\.0)?", text) and 0 <= int(float(text)) - first < len(options):
            return int(float(text)) - first
    raise EntryError(f"answer {answer!r} is none of the {len(options)} options")


def pairs_of(turns: Sequence[Any]) -> list[Exchange]:
    """(question, answer) pairs of any of the common ways to write a conversation."""
    for one, other in _PAIRS:
        if all(isinstance(turn, dict) and one in turn and other in turn for turn in turns):
            return [(turn[one], turn[other]) for turn in turns]
    for speaker, value in _SPEAKERS:
        if all(isinstance(turn, dict) and speaker in turn and value in turn for turn in turns):
            return _alternating([(str(turn[speaker]).lower(), turn[value]) for turn in turns])
    if all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        return [(turn[0], turn[1]) for turn in turns]
    raise EntryError(f"turns are in an unknown form: {turns[0]!r}"[:80])


def _alternating(said: Sequence[tuple[str, Any]]) -> list[Exchange]:
    said = [turn for turn in said if turn[0] != "system"]
    if said and _ROLES.get(said[0][0]) == 1:
        said = said[1:]  # an answer before the first question: LLaVA drops it, too
    for index, (speaker, _) in enumerate(said):
        if _ROLES.get(speaker) != index % 2:
            raise EntryError(f"turn {index} is spoken by {speaker!r}, out of turn")
    return [(said[index][1], said[index + 1][1]) for index in range(0, len(said) - 1, 2)]


def first_of(value: Any) -> Any:
    """The first of several answers."""
    return (value[0] if value else None) if isinstance(value, list) else value
