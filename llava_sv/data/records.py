"""LLaVA records: their schema and its checks. A decoded JSON value arrives, a `LlavaRecord` or a `UserError` leaves.

Called by `data.index` for every record of a file, once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llava_sv.constants import DEFAULT_IMAGE_TOKEN
from llava_sv.data.image_refs import parse_ref
from llava_sv.errors import UserError

SPEAKERS = ("human", "gpt")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]*").fullmatch
"""Of a file that is no container's member; relative."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 80
"""Characters of an id or path that a message repeats."""


class RecordError(UserError):
    """What is wrong with a record; `kind` names it for `llava-sv data check` (see `data.findings`)."""

    def __init__(self, message: str, kind: str = "schema") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class LlavaRecord:
    """One conversation. `images`: paths relative to the image folder, one for each `<image>` in `turns`, in order.
    `turns`: `{"from": "human" | "gpt", "value": text}`, alternating; a human begins and an answer ends."""

    id: str
    images: tuple[str, ...]
    turns: tuple[dict[str, str], ...]


def as_json(record: LlavaRecord, source: str = "") -> dict[str, Any]:
    """The record as a data file has it, with the data set that it is from; `check_record` gives the record again."""
    value: dict[str, Any] = {"id": record.id} if record.id else {}
    if record.images:
        value["image"] = record.images[0] if len(record.images) == 1 else list(record.images)
    value["conversations"] = [dict(turn) for turn in record.turns]
    return value | ({"source": source} if source else {})


def check_record(raw: Any, where: str) -> LlavaRecord:
    """The record that `raw` is, or `UserError` with `where` (file and line), the record's id and the field.

    As LLaVA does: an answer before the first question is dropped, and so is a question after the last answer.
    """
    plain = _plain(raw)
    if plain is not None:
        return plain
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: expected a record (a JSON object), found {_kind(raw)}")
    identity = raw.get("id")
    if isinstance(identity, (dict, list)):
        raise RecordError(f"{where}: field 'id' is {_kind(identity)}; expected text or a number")
    where = where if identity is None else f"{where}: record {shown(identity)}"
    if isinstance(identity, str):
        _check_unicode(identity, f"{where}: field 'id'")
    turns = _conversations(raw, where)
    images = _images(raw, where)
    marks = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if marks != len(images):
        raise RecordError(
            f"{where}: {_count(len(images), 'image')} in field 'image' but {marks} {DEFAULT_IMAGE_TOKEN} in the "
            f"conversation; make the two counts equal",
            "image_count",
        )
    return LlavaRecord("" if identity is None else str(identity), images, turns)


def _plain(raw: Any) -> LlavaRecord | None:
    """The record, where all is as it nearly always is; None: look closely. Several times as fast as looking closely."""
    try:
        turns, image = raw["conversations"], raw.get("image")
        asked, told = turns[::2], turns[1::2]
        if not told or len(asked) != len(told):
            return None
        # only text joins; the zero keeps a mark from coming about where two texts meet
        questions = "\0".join([turn["value"] for turn in asked])
        answers = "\0".join([turn["value"] for turn in told])
        if [turn["from"] for turn in turns] != ["human", "gpt"] * len(told) or DEFAULT_IMAGE_TOKEN in answers:
            return None
        if image is None:
            images: tuple[str, ...] = ()
        elif isinstance(image, str) and _PLAIN_PATH(image) and ".." not in image:
            images = (image,)
        else:
            return None
        if questions.count(DEFAULT_IMAGE_TOKEN) != len(images):
            return None
        identity = raw.get("id", "")
        if not isinstance(identity, str | int):
            return None
        for text in (str(identity), questions, answers):
            text.encode()  # half of a surrogate pair is no character
        if set(map(len, turns)) != {2}:
            turns = [{"from": turn["from"], "value": turn["value"]} for turn in turns]
        return LlavaRecord(str(identity), images, tuple(turns))
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        return None


def _conversations(raw: dict[str, Any], where: str) -> tuple[dict[str, str], ...]:
    given = raw.get("conversations")
    if given is None:
        raise RecordError(f"{where}: has no field 'conversations'; expected a list of {{'from', 'value'}} turns")
    if not isinstance(given, list):
        raise RecordError(
            f"{where}: field 'conversations' is {_kind(given)}; expected a list of {{'from', 'value'}} turns"
        )
    turns = [_turn(turn, f"{where}: conversations[{index}]") for index, turn in enumerate(given)]
    first = 1 if turns and turns[0]["from"] == "gpt" else 0
    last = len(turns) - 1 if turns and turns[-1]["from"] == "human" else len(turns)
    kept = turns[first:last]
    if not kept:
        raise RecordError(f"{where}: field 'conversations' holds no question with an answer", "no_answer")
    for index, turn in enumerate(kept):
        if turn["from"] != SPEAKERS[index % 2]:
            raise RecordError(
                f"{where}: conversations[{first + index}] is the second {turn['from']!r} turn in a row", "roles"
            )
        if turn["from"] == "gpt" and DEFAULT_IMAGE_TOKEN in turn["value"]:
            raise RecordError(
                f"{where}: conversations[{first + index}] is an answer with {DEFAULT_IMAGE_TOKEN} in it; "
                f"images belong to human turns: reword it",
                "image_in_answer",
            )
    if kept[-1]["from"] == "human":  # two questions end it, of which one was dropped
        raise RecordError(f"{where}: conversations[{last}] is the second 'human' turn in a row", "roles")
    return tuple(kept)


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} is {_kind(turn)}; expected an object with 'from' and 'value'")
    for field in ("from", "value"):
        if not isinstance(turn.get(field), str):
            raise RecordError(f"{where}: field {field!r} is {_kind(turn.get(field))}; expected text")
    if turn["from"] not in SPEAKERS:
        raise RecordError(f"{where}: unknown speaker {shown(turn['from'])}; known: {', '.join(SPEAKERS)}", "speaker")
    _check_unicode(turn["value"], where)
    return {"from": turn["from"], "value": turn["value"]}


def _images(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    given = raw.get("image")
    if given is None or given == "":
        return ()
    images = [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise RecordError(f"{where}: field 'image' is {_kind(given)}; expected a path or a list of paths")
    for image in images:
        _check_unicode(image, f"{where}: field 'image'")
        try:
            parse_ref(image)
        except UserError as error:
            raise RecordError(f"{where}: {error}", "unsafe_path") from error
    return tuple(images)


def _check_unicode(text: str, where: str) -> None:
    """Half of a surrogate pair is no character: it cannot be stored as UTF-8, nor tokenised."""
    found = _SURROGATE.search(text)
    if found is not None:
        raise RecordError(
            f"{where}: holds \\u{ord(found[0]):04x}, half of a surrogate pair, at character {found.start() + 1}",
            "invalid_unicode",
        )


def shown(value: Any) -> str:
    """`value`, text or a number, for a message: one line, not too long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list) and not all(isinstance(item, str) and item for item in value):
        return "a list with something else than text in it"
    names = {type(None): "missing", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
