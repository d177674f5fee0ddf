"""One annotation, a dict of whatever fields, becomes a LLaVA record by options that say which field is what. Dicts
arrive, each with where it stands; `Item`s leave. Called by `field_files`, `parquet`, and converters whose entries need
more work before they are plain dicts.

A *name* is a field's; dots lead into objects, lists by number, and over all items of a list (`answers.text`). A
*template* is text with `{name}`, `{name:06d}`, `{name:file}` (what follows the last slash) or `{name:stem}` in it.

    image         name or template of the picture's file, or a list of them; the field may hold a list itself
    text_only     true: entries without a picture are kept (default: they are a problem)
    question, answer   names; both lists of one length: several exchanges
    question_text, answer_text   templates, in their place
    answers       name of a list of answers, of which the most common is taken
    choices       name of a list or object of options, or a list of names; `answer` is then an index from
                  `first_choice` (0) on, a letter, or the option itself
    turns         name of a list of {user, assistant}, {question, answer}, [question, answer], {from, value} or
                  {role, content}; with `question` too, that, `answer`, ... are names inside each of them
    prompt        what follows each question: none, short, letter, caption, detail, or any text
    words         answers to put into other words: {"0": "No", "1": "Yes"}
    no_answer     what stands for an empty answer (default: that is a problem)
    where         {name: value or list of values}: other entries are left out
    id            name or template; otherwise source, file and number
    together      true: a file's entries about the same pictures become one record (they are held in memory)
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_sv.data.converters import prompts
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.errors import UserError

Exchange = tuple[str, str]

PROMPTS = {
    "none": "",
    "short": prompts.SHORT,
    "letter": prompts.LETTER,
    "caption": prompts.DESCRIBE,
    "detail": prompts.DESCRIBE_IN_DETAIL,
}
_PAIRS = (("user", "assistant"), ("question", "answer"))
_SPEAKERS = (("from", "value"), ("role", "content"))
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
_SLOT = re.compile(r"\{([^{}:]+)(?::(file|stem|0?\d*d))?\}")
_MISSING = object()


class EntryError(ValueError):
    """What is wrong with one annotation; the rest of the file goes on."""


@dataclass(frozen=True)
class Fields:
    """The options above, checked. Lists where an option may be one name or several."""

    image: tuple[str, ...] = ()
    text_only: bool = False
    question: str = ""
    answer: str = ""
    question_text: str = ""
    answer_text: str = ""
    answers: str = ""
    choices: tuple[str, ...] = ()
    first_choice: int = 0
    turns: str = ""
    prompt: str = ""
    words: dict[str, str] = field(default_factory=dict)
    no_answer: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    together: bool = False

    def keeps(self, entry: dict[str, Any]) -> bool:
        """Whether the entry is one of those that `where` asks for."""
        for name, wanted in self.where.items():
            if lookup(entry, name, None) not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        return True

    def images(self, entry: dict[str, Any]) -> list[str]:
        """The names of the entry's pictures, as its files give them."""
        names: list[str] = []
        for name in self.image:
            value = fill(name, entry, None) if "{" in name else lookup(entry, name, None)
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict):
                    one = one.get("path")
                if one is not None and not isinstance(one, str):
                    raise EntryError(f"{name!r} is {one!r}, no picture's name")
                if one:
                    names.append(one)
        return names

    def exchanges(self, entry: dict[str, Any]) -> list[Exchange]:
        """The entry's questions with their answers."""
        if self.turns:
            turns = lookup(entry, self.turns)
            if not isinstance(turns, list) or not turns:
                raise EntryError(f"{self.turns!r} holds no turns")
            if not (self.question or self.question_text):
                return [self._finished(question, answer) for question, answer in pairs_of(turns)]
            return [self._exchange(self._object(turn)) for turn in turns]
        if self.question and isinstance(lookup(entry, self.question, None), list):
            return self._several(entry)
        return [self._exchange(entry)]

    def _several(self, entry: dict[str, Any]) -> list[Exchange]:
        questions, answers = lookup(entry, self.question), lookup(entry, self.answer or self.answers)
        if not isinstance(answers, list) or len(answers) != len(questions) or not questions:
            count = len(answers) if isinstance(answers, list) else 1
            raise EntryError(f"{len(questions)} questions in {self.question!r} but {count} answers")
        return [self._finished(question, _first(answer)) for question, answer in zip(questions, answers)]

    def _exchange(self, entry: dict[str, Any]) -> Exchange:
        if self.question_text:
            question = fill(self.question_text, entry)
        else:
            question = text_of(lookup(entry, self.question)) if self.question else ""
        if self.choices:
            return prompts.choices(question, *self._chosen(entry))
        if self.answer_text:
            answer: Any = fill(self.answer_text, entry)
        elif self.answers:
            given = lookup(entry, self.answers, None)
            known = [text_of(one) for one in (given if isinstance(given, list) else [given]) if one not in (None, "")]
            answer = prompts.most_common(known) if known else ""
        else:
            answer = _first(lookup(entry, self.answer, None))
        return self._finished(question, answer)

    def _chosen(self, entry: dict[str, Any]) -> tuple[list[str], int]:
        """(options, index of the right one)."""
        if len(self.choices) > 1:
            given: Any = [lookup(entry, name, None) for name in self.choices]
            given = [one for one in given if one not in (None, "")]
        else:
            given = lookup(entry, self.choices[0])
        keys = list(given) if isinstance(given, dict) else []
        options = [text_of(one) for one in (given.values() if isinstance(given, dict) else given)]
        answer = _first(lookup(entry, self.answer))
        return options, choice_of(answer, options, keys, self.first_choice)

    def _finished(self, question: Any, answer: Any) -> Exchange:
        answer = "" if answer is None else text_of(answer).strip()
        answer = self.words.get(answer, answer) or self.no_answer
        if not answer:
            raise EntryError("has no answer")
        prompt = PROMPTS.get(self.prompt, self.prompt)
        question = "\n".join(part for part in (text_of(question).strip(), prompt) if part)
        return question, answer

    def _object(self, turn: Any) -> dict[str, Any]:
        if not isinstance(turn, dict):
            raise EntryError(f"{self.turns!r} holds {turn!r}, no object")
        return turn


def fields_of(inputs: Inputs, also: Sequence[str] = ()) -> Fields:
    """The source's options as `Fields`; `also`: options that the converter reads itself. `UserError` for others."""
    given = {name: value for name, value in inputs.source.options.items() if name not in also}
    known = Fields.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UserError(
                f"source {inputs.source.name!r}: converter {inputs.source.converter!r} has no option {name!r}; "
                f"known: {', '.join(sorted([*known, *also]))}"
            )
    for name in ("image", "choices"):
        if name in given:
            given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
    if "words" in given:
        given["words"] = {str(key): str(value) for key, value in given["words"].items()}
    return Fields(**given)


def items(
    inputs: Inputs,
    fields: Fields,
    entries: Iterable[tuple[str, Any]],
    images: Callable[[dict[str, Any]], list[str]] | None = None,
) -> Iterator[Item]:
    """An `Item` for each (where, entry) of one annotation file. images: gives an entry's references; by default the
    names of `fields.image` below the source's folder."""
    made = _made(inputs, fields, entries, images or (lambda entry: [inputs.image(one) for one in fields.images(entry)]))
    return _together(made) if fields.together else made


def _made(
    inputs: Inputs,
    fields: Fields,
    entries: Iterable[tuple[str, Any]],
    images: Callable[[dict[str, Any]], list[str]],
) -> Iterator[Item]:
    for number, (where, entry) in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise EntryError(f"expected an object with fields, found {str(entry)[:40]!r}")
            if not fields.keeps(entry):
                continue
            references = images(entry)
            if fields.image and not references and not fields.text_only:
                raise EntryError("has no picture")
            if fields.id:
                identity = fill(fields.id, entry) if "{" in fields.id else text_of(lookup(entry, fields.id))
            else:
                identity = f"{inputs.source.name}/{entry.get('@stem', '')}/{number}"
            record = conversation(identity, fields.exchanges(entry), references)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            yield Item(where, problem=str(error))
        else:
            yield Item(where, record)


def _together(made: Iterator[Item]) -> Iterator[Item]:
    """Records about the same pictures as one, at the place of the first; problems keep theirs."""
    kept: list[Item] = []
    first: dict[str, dict[str, Any]] = {}
    for item in made:
        if item.record is None or "image" not in item.record:
            kept.append(item)
            continue
        record = first.setdefault(str(item.record["image"]), item.record)
        if record is item.record:
            kept.append(item)
            continue
        turns = item.record["conversations"]
        opening = turns[0]["value"].replace("<image>\n", "")
        record["conversations"] += [{"from": "human", "value": opening}, *turns[1:]]
    yield from kept


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
        name = text_of(value).replace("\\", "/").rsplit("/", 1)[-1]
        return name if slot[2] == "file" else name.rsplit(".", 1)[0]

    return _SLOT.sub(filled, template)


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
    for index, (speaker, _) in enumerate(said):
        if _ROLES.get(speaker) != index % 2:
            raise EntryError(f"turn {index} is spoken by {speaker!r}, out of turn")
    return [(said[index][1], said[index + 1][1]) for index in range(0, len(said) - 1, 2)]


def _first(value: Any) -> Any:
    """The first of several answers."""
    return (value[0] if value else None) if isinstance(value, list) else value
