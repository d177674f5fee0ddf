"""Good records and pictures, and ways to mutate them, for the fuzz test. Each mutation says what must come of it.

`HARMFUL`: check must name it, training must not see it. `HARMLESS`: it must come through. `EITHER`: damage that may or
may not show.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.data.samples import exchange

HARMFUL, HARMLESS, EITHER = "harmful", "harmless", "either"
SURROGATE = re.compile("[\ud800-\udfff]")
WORDS = ["What", "is", "it?", "réd", "日本", "<b>", "{", "}", '"', "\\", "[1, 2]", "a\nb", "\U0001f600", "'", "\t"]


# -- records ----------------------------------------------------------------------------------------------------------


def _words(rng):
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, 8)))


def good_record(rng, number, images):
    """A good one; its text names its number, so that no two are alike."""
    turns = []
    for index in range(rng.randrange(1, 4)):
        turns += exchange(f"{_words(rng)} {number}?", f"{_words(rng)} {number}-{index}.")
    record = {"id": f"r{number}", "conversations": turns}
    if rng.random() < 0.7:
        record["image"] = rng.choice(images)
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    if rng.random() < 0.1:
        record["meta"] = {"score": rng.random(), "tags": ["a", {"b": None}]}
    return record


Mutation = Callable[[random.Random, dict], tuple[str, str]]
"""(rng, a good record) -> (what must come of it, the text that stands in the file, on one line)."""
MUTATIONS: list[Mutation] = []


def _mutation(outcome):
    """A function that changes a record's value (or returns another) and always has this outcome."""

    def register(change):
        def mutate(rng, record):
            changed = change(rng, record)
            value = record if changed is None else changed
            text = json.dumps(value, ensure_ascii=False)
            return outcome, text if rng.random() < 0.5 and not SURROGATE.search(text) else json.dumps(value)

        mutate.__name__ = change.__name__
        MUTATIONS.append(mutate)
        return change

    return register


def _text_mutation(change):
    """A function of the record's text that returns (outcome, text)."""
    MUTATIONS.append(change)
    return change


ODD = [None, 5, -1.5, True, "text", [], {}, [[]], [5], [None], float("nan"), float("inf"), 10**400, {"a": {"b": 1}}]


@_mutation(HARMFUL)
def other_value(rng, record):
    return rng.choice([value for value in ODD if value is not None] + [[record], "x" * 9999])


@_mutation(HARMFUL)
def other_conversations(rng, record):
    record["conversations"] = rng.choice(ODD)


@_mutation(HARMFUL)
def other_turn(rng, record):
    record["conversations"][rng.randrange(len(record["conversations"]))] = rng.choice(ODD)


@_mutation(HARMFUL)
def other_speaker(rng, record):
    rng.choice(record["conversations"])["from"] = rng.choice([*ODD, "user", "Assistant", "system", "nobody", ""])


@_mutation(HARMFUL)
def other_text(rng, record):
    rng.choice(record["conversations"])["value"] = rng.choice([value for value in ODD if value != "text"])


@_mutation(HARMFUL)
def no_field(rng, record):
    if rng.random() < 0.5:
        del record["conversations"]
    else:
        del rng.choice(record["conversations"])[rng.choice(["from", "value"])]


@_mutation(HARMFUL)
def twice_the_same_speaker(rng, record):
    turns = record["conversations"]
    turns.insert(1, dict(turns[0], value="again"))


@_mutation(HARMFUL)
def another_mark(rng, record):
    turns = record["conversations"]
    turns[rng.randrange(len(turns) // 2) * 2]["value"] += " <image>"


@_mutation(HARMFUL)
def mark_in_answer(rng, record):
    record["conversations"][1]["value"] += " <image> "


@_mutation(HARMFUL)
def odd_image(rng, record):
    record["image"] = rng.choice([value for value in ODD if value not in (None, "text", [])])


@_mutation(HARMFUL)
def odd_path(rng, record):
    climbing = ["../a.png", "/etc/passwd", "a/../../b.png", "C:\\a.png", "~/a", "nul\0.png", "..", "x.tar::/a", "a::b"]
    absent = ["gone.png", "", "folder", "a" * 3000, "new\nline.png", "0.png/b.png", "\ud800.png", " ", "pipe.png"]
    record["image"] = [rng.choice(climbing + absent)]
    turns = record["conversations"]
    turns[0]["value"] = "<image>" + turns[0]["value"].replace("<image>", "")


@_mutation(HARMFUL)
def half_a_pair(rng, record):
    turn = rng.choice(record["conversations"])
    turn["value"] += rng.choice(["\ud800", "\udfff x", "\ude00\ud83d"])


@_mutation(HARMFUL)
def id_of_another_kind(rng, record):
    record["id"] = rng.choice([[], {}, [1], {"a": 1}])


@_mutation(HARMLESS)
def odd_id(rng, record):
    huge = 10**300 + rng.getrandbits(40)
    record["id"] = rng.choice([rng.randrange(10**9), -1.5 * rng.random(), f"é{rng.random()}", huge])


@_mutation(HARMLESS)
def more_fields(rng, record):
    record["more"] = rng.choice(ODD)


@_mutation(HARMLESS)
def markup(rng, record):
    record["conversations"][1]["value"] += rng.choice([" < image>", "<|x", "<s >", "&amp;<script>", "]}", '{"id": 1}'])


@_mutation(HARMLESS)
def long_text(rng, record):
    record["conversations"][-1]["value"] += " yes" * rng.randrange(500)


@_text_mutation
def cut(rng, record):
    text = json.dumps(record)
    return HARMFUL, text[: rng.randrange(1, len(text))]


@_text_mutation
def byte_flips(rng, record):
    data = bytearray(json.dumps(record, ensure_ascii=False).encode())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(1, len(data))] ^= 1 << rng.randrange(8)
    return EITHER, data.replace(b"\n", b"?").replace(b"\r", b"?").decode("utf-8", "surrogateescape")


@_text_mutation
def bytes_that_are_no_text(rng, record):
    data = json.dumps(record).encode()
    at = data.index(b'"value": "') + 10
    bad = rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x80\x80"])
    return HARMFUL, (data[:at] + bad + data[at:]).decode("utf-8", "surrogateescape")


@_text_mutation
def deep(rng, record):
    depth = rng.choice([2_000, 50_000])
    return HARMFUL, json.dumps(record)[:-1] + ', "deep": ' + rng.choice(["[", '{"a":']) * depth


@_text_mutation
def deep_and_whole(rng, record):
    return HARMFUL, json.dumps(record)[:-1] + ', "deep": ' + "[" * 60_000 + "]" * 60_000 + "}"


@_text_mutation
def huge_number(rng, record):
    return HARMFUL, json.dumps(record)[:-1] + ', "number": ' + "7" * 5_000 + "}"


@_text_mutation
def raw_control(rng, record):
    return HARMFUL, json.dumps(record).replace('"value": "', '"value": "' + chr(rng.randrange(1, 9)), 1)


@_text_mutation
def missing_quote(rng, record):
    text = json.dumps(record)
    places = [found.start() for found in re.finditer(r'(?<!\\)"', text)]
    at = rng.choice(places)
    return HARMFUL, text[:at] + text[at + 1 :]


@_text_mutation
def garbage(rng, record):
    return HARMFUL, "".join(rng.choices('{}[]:,"abc0 \\', k=rng.randrange(3, 40))).strip() + "!"


@_text_mutation
def single_quotes(rng, record):
    return HARMFUL, str({"id": 5, "conversations": []})


# -- pictures ---------------------------------------------------------------------------------------------------------

FORMATS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP"}


def _picture(rng):
    side = rng.randrange(24, 48)
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (side, side + 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(rng, suffix=None):
    suffix = suffix or rng.choice(sorted(FORMATS))
    options = {"progressive": rng.random() < 0.3} if suffix == "jpg" else {}
    file = io.BytesIO()
    _picture(rng).save(file, FORMATS[suffix], **options)
    return suffix, file.getvalue()


def damaged_picture(rng):
    """(suffix, bytes, what must come of it)."""
    suffix, data = encoded(rng)
    kind = rng.choice(["cut", "cut", "empty", "flips", "text", "swapped", "zeros", "other suffix", "head only"])
    if kind == "cut":
        return suffix, data[: rng.randrange(1, int(len(data) * 0.95))], HARMFUL
    if kind == "head only":
        return suffix, data[: rng.randrange(1, 20)], HARMFUL
    if kind == "empty":
        return suffix, b"", HARMFUL
    if kind == "text":
        return suffix, rng.choice([b"<html>404</html>", b"\0" * 500, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"x"]), HARMFUL
    if kind == "other suffix":
        return rng.choice(sorted(FORMATS)), data, HARMLESS
    changed = bytearray(data)
    if kind == "flips":
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "swapped":
        at, other = rng.randrange(len(changed)), rng.randrange(len(changed))
        changed[at : at + 50], changed[other : other + 50] = changed[other : other + 50], changed[at : at + 50]
    else:
        at = rng.randrange(len(changed))
        changed[at : at + 200] = bytes(len(changed[at : at + 200]))
    return suffix, bytes(changed), EITHER
