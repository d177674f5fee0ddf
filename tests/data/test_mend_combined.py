"""Records with several defects at once: mending leaves a record that passes the checks, or none, and loses no good
one."""

from __future__ import annotations

import json
import random

import pytest

from llava_sv.data.check_records import examine, special_tokens
from llava_sv.data.mend import mend
from tests.data.samples import exchange

PIECES = [
    "\0",
    "\ud800",
    "\udc80",
    "\ufeff",
    "</s>",
    "<image>",
    "<ima\0ge>",
    "<ima\ufeffge>",
    "\u2028",
    "\x85",
    "\uffff",
]
SPEAKERS = ["user", "Assistant", "GPT:", "system", "", None, 3, ["human"], "human", "gpt"]
IMAGES = ["", None, [], [""], ["", None, "a.png"], "a.png", ["a.png", "b.png"], "../x", "a\0", 5, [None], "a\ud800"]
TURNS = [{"from": "gpt", "value": "z"}, {"from": "human", "value": "<image>z"}, {"from": "human", "value": ""}, {}]


def _record(rng):
    turns = [turn for number in range(rng.choice((1, 1, 2, 3))) for turn in exchange(f"q{number}", f"a{number}")]
    images = ["a.png", "b.png"][: rng.choice((0, 1, 1, 2))]
    for _ in images:
        turn = rng.choice(turns[::2])
        turn["value"] = "<image>\n" + turn["value"]
    return {"id": "x", "conversations": turns, **({"image": images} if images else {})}


def _damage(rng, record):
    """One defect, in place."""
    turns = record["conversations"]
    turn = rng.choice([turn for turn in turns if turn] or [{}])
    kind = rng.randrange(9)
    if kind == 0:
        turn["from"] = rng.choice(SPEAKERS)
    elif kind == 1:
        turn["value"] = rng.choice(("", " ", "\0", "\ufeff", None, 5, "\ufeff<image>"))
    elif kind <= 4:
        text = str(turn.get("value"))
        at = rng.randrange(len(text) + 1)
        turn["value"] = text[:at] + rng.choice(PIECES) + text[at:]
    elif kind == 5:
        turns.insert(rng.randrange(len(turns) + 1), rng.choice((None, *({**turn} for turn in TURNS))))
    elif kind == 6 and turns:
        del turns[rng.randrange(len(turns))]
    elif kind == 7:
        record["image"] = rng.choice(IMAGES)
    else:
        record[rng.choice(("id", "extra"))] = rng.choice(([], {}, None, "", True, 1.5, "a\ud800"))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_mended_passes_and_what_was_good_is_kept(seed):
    rng, special = random.Random(seed), special_tokens()
    kept = left_out = 0
    for _ in range(2500):
        record = _record(rng)
        for _ in range(rng.choice((0, 1, 2, 3, 5))):
            _damage(rng, record)
        before = json.dumps(record)
        good, found = examine(record, "f", special)
        value, changes = mend(record)
        assert json.dumps(record) == before
        if value is None:
            left_out += 1
            assert good is None, record
            assert changes[-1][1].startswith("left out: ")
            continue
        kept += 1
        assert (value != record) == bool(changes)
        mended, after = examine(value, "f", special)
        assert mended is not None, record
        harmless = {"special_tokens", "dropped_turn", "empty_answer", "empty_question"}
        assert {kind for kind, _ in after} <= harmless, (record, after)
        if good is not None and not found:
            assert mended == good
    assert min(kept, left_out) > 500
