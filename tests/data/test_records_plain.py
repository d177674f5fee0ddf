"""Records looked at the fast way and looked at closely: the same record, or the same complaint."""

from __future__ import annotations

import copy
import random

from llava_sv.data import records
from llava_sv.data.records import check_record
from llava_sv.errors import UserError
from tests.data.samples import text_only, with_image

GOOD = (
    with_image("1"),
    with_image(2, image="coco/train2017/0 1.jpg"),
    with_image("3", image=["a.png", "b.png"], question="<image><image>?"),
    with_image("4", image="a.tar::b.jpg@512+10"),
    text_only("5"),
    text_only("6") | {"image": ""},
    text_only("7") | {"source": "elsewhere"},
)
VALUES = (
    "",
    "a.png",
    "../a.png",
    "/a.png",
    "C:\\a.png",
    "a\\..\\b",
    "<image>",
    "gpt",
    "human",
    None,
    3,
    2.5,
    True,
    [],
    {},
)
TEXTS = ("<ima", "ge>", "<image>", "\ud800", "\0", "plain")


def outcome(raw):
    try:
        return check_record(raw, "here")
    except UserError as error:
        return str(error)


def mutated(rng):
    raw = copy.deepcopy(rng.choice(GOOD))
    for _ in range(rng.choice((0, 1, 1, 2))):
        turns = raw.get("conversations")
        turns = turns if isinstance(turns, list) else []
        turn = rng.choice(turns) if turns else {}
        kind = rng.randrange(7)
        if kind == 0:
            raw[rng.choice(("id", "image", "conversations"))] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 1:
            raw.pop(rng.choice(("id", "image", "conversations")), None)
        elif kind == 2 and isinstance(turn, dict):
            turn[rng.choice(("from", "value", "weight"))] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and isinstance(turn, dict):
            turn["value"] = f"{turn.get('value')}{rng.choice(TEXTS)}"
        elif kind == 4 and turns:
            turns.append(copy.deepcopy(rng.choice(turns)))
        elif kind == 5 and turns:
            turns.pop(rng.randrange(len(turns)))
        elif kind == 6 and turns:
            turns[rng.randrange(len(turns))] = copy.deepcopy(rng.choice(VALUES))
    return raw


def test_both_ways_agree(monkeypatch):
    rng = random.Random(0)
    cases = [mutated(rng) for _ in range(4000)]
    before = copy.deepcopy(cases)
    fast = [outcome(raw) for raw in cases]
    assert cases == before
    taken = [records._plain(raw) is not None for raw in cases]
    monkeypatch.setattr(records, "_plain", lambda raw: None)
    closely = [outcome(raw) for raw in cases]
    unlike = [raw for raw, one, other in zip(cases, fast, closely) if one != other]
    assert unlike == []
    assert 400 < sum(taken) < 3000
    assert sum(isinstance(each, str) for each in closely) > 1000
