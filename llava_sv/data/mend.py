"""One damaged record -> a record that passes `check_record`, and what was done to it; or None where that would be
guessing. Called by `data.fix`. The value given is never changed.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from llava_sv.constants import DEFAULT_IMAGE_TOKEN
from llava_sv.data.check_records import BYTE_ORDER_MARK, CONTROL
from llava_sv.data.records import SPEAKERS, RecordError, check_record

Change = tuple[str, str]
"""(kind of finding, what was done)."""

ALIASES = {
    **dict.fromkeys(("human", "user", "question", "q", "usr"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bard", "answer", "a"), "gpt"),
}
"""What a speaker is called elsewhere, in small letters."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def mend(raw: Any) -> tuple[dict[str, Any] | None, list[Change]]:
    """(the mended record, or None where it must be left out; changes, the last of which says why it is left out)."""
    if not isinstance(raw, dict):
        return None, [("schema", "left out: no JSON object")]
    value, changes = copy.deepcopy(raw), []
    for step in (_unicode, _identity, _image_field, _turn_fields, _texts, _ends, _empty, _marks):
        changes += step(value)
    try:
        check_record(value, "")
    except RecordError as error:
        return None, [*changes, (error.kind, f"left out: {str(error).removeprefix(': ')}")]
    return value, changes


def _unicode(value: dict[str, Any]) -> list[Change]:
    """Half pairs, and bytes that were no UTF-8, become U+FFFD, wherever they are."""
    changed = False

    def clean(item: Any) -> Any:
        nonlocal changed
        if isinstance(item, str):
            if item.isascii() or _SURROGATE.search(item) is None:
                return item
            changed = True
            return _SURROGATE.sub("\ufffd", item)
        if isinstance(item, list):
            return [clean(inner) for inner in item]
        if isinstance(item, dict):
            return {clean(key): clean(inner) for key, inner in item.items()}
        return item

    cleaned = clean(value)
    if changed:
        value.clear()
        value.update(cleaned)
    return [("invalid_unicode", "what is no character replaced by U+FFFD")] if changed else []


def _identity(value: dict[str, Any]) -> list[Change]:
    if not isinstance(value.get("id"), (dict, list)):
        return []
    del value["id"]
    return [("schema", "field 'id', no text or number, removed")]


def _image_field(value: dict[str, Any]) -> list[Change]:
    given = value.get("image")
    if given == "":
        del value["image"]
        return [("empty_image_field", "empty field 'image' removed")]
    if isinstance(given, list) and any(image in ("", None) for image in given):
        value["image"] = [image for image in given if image not in ("", None)]
        return [("schema", "empty paths in field 'image' removed")]
    return []


def _turns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns, where there is a list of nothing but turns; otherwise none, which no step then touches."""
    turns = value.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return turns
    return []


def _turn_fields(value: dict[str, Any]) -> list[Change]:
    changes = []
    for turn in _turns(value):
        for wanted, other in (("from", "role"), ("value", "content")):
            if wanted not in turn and isinstance(turn.get(other), str):
                turn[wanted] = turn.pop(other)
                changes.append(("schema", f"field {other!r} of a turn renamed {wanted!r}"))
        speaker = turn.get("from")
        if isinstance(speaker, str) and speaker not in SPEAKERS:
            known = ALIASES.get(speaker.strip().strip(":").lower())
            if known is not None:
                turn["from"] = known
                changes.append(("speaker", f"speaker {speaker!r} renamed {known!r}"))
    return changes


def _texts(value: dict[str, Any]) -> list[Change]:
    changes = []
    for turn in _turns(value):
        text = turn.get("value")
        if not isinstance(text, str):
            continue
        readable = _without(CONTROL, text)
        for kind, cleaned in (
            ("control_characters", readable),
            ("byte_order_mark", _without(re.compile(BYTE_ORDER_MARK), readable)),
        ):
            if cleaned != turn["value"]:
                turn["value"] = cleaned
                changes.append((kind, f"removed from a turn of {turn.get('from')!r}"))
        if turn["value"] != text:
            turn["value"] = turn["value"].strip()
    return changes


def _without(pattern: re.Pattern[str], text: str) -> str:
    """`text` with nothing, or where that would bring an <image> about, with a blank, in place of what is found."""
    cleaned = pattern.sub("", text)
    return cleaned if cleaned.count(DEFAULT_IMAGE_TOKEN) == text.count(DEFAULT_IMAGE_TOKEN) else pattern.sub(" ", text)


def _ends(value: dict[str, Any]) -> list[Change]:
    """What training drops is left out: answers before the first question, a question after the last answer.

    An image that such a turn shows would be lost, so a record with one is left alone.
    """
    turns, changes = _turns(value), []
    if turns and turns[0].get("from") == "gpt" and DEFAULT_IMAGE_TOKEN not in str(turns[0].get("value")):
        del turns[0]
        changes.append(("dropped_turn", "answer before the first question left out"))
    if turns and turns[-1].get("from") == "human" and DEFAULT_IMAGE_TOKEN not in str(turns[-1].get("value")):
        del turns[-1]
        changes.append(("dropped_turn", "question after the last answer left out"))
    return changes


def _empty(value: dict[str, Any]) -> list[Change]:
    """Exchanges with an empty answer are left out, where no image goes with them."""
    turns, changes = _turns(value), []
    index = 0
    while index + 1 < len(turns):
        question, answer = turns[index], turns[index + 1]
        pair = (question.get("from"), answer.get("from")) == SPEAKERS
        blank = isinstance(answer.get("value"), str) and not answer["value"].strip()
        if pair and blank and DEFAULT_IMAGE_TOKEN not in str(question.get("value")) and len(turns) > 2:
            del turns[index : index + 2]
            changes.append(("empty_answer", "question and its empty answer left out"))
        else:
            index += 2 if pair else 1
    return changes


def _marks(value: dict[str, Any]) -> list[Change]:
    """`<image>` where it belongs, if the counts say where that is."""
    given, turns = value.get("image"), _turns(value)
    images = given if isinstance(given, list) else [] if given is None else [given]
    if not turns or not all(isinstance(turn.get("value"), str) for turn in turns):
        return []
    asked = [turn for turn in turns if turn.get("from") == "human"]
    said = [turn for turn in turns if turn.get("from") != "human"]
    in_questions, in_answers = _count(asked), _count(said)
    if not asked:
        return []
    if in_answers and in_questions == len(images):
        for turn in said:
            turn["value"] = turn["value"].replace(DEFAULT_IMAGE_TOKEN, "< image>")
        return [("image_in_answer", "<image> in an answer, without a picture of its own, kept as text")]
    if in_answers and in_answers == len(images) and not in_questions:
        for turn in said:
            turn["value"] = turn["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        _put_in_front(asked[0], len(images))
        return [("image_in_answer", "<image> moved from an answer to the first question")]
    if not in_answers and not in_questions and len(images) == 1:
        _put_in_front(asked[0], 1)
        return [("image_count", "<image> put in front of the first question")]
    return []


def _count(turns: list[dict[str, Any]]) -> int:
    return sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)


def _put_in_front(turn: dict[str, Any], images: int) -> None:
    turn["value"] = "\n".join([*[DEFAULT_IMAGE_TOKEN] * images, turn["value"]])
