"""A set of texts against Python's own, across merges."""

import random

from llava_sv.data import seen


def test_it_is_a_set(monkeypatch):
    monkeypatch.setattr(seen, "MERGE_AT", 10)
    rng, ours, theirs = random.Random(1), seen.Seen(), set()
    for _ in range(2000):
        text = f"{rng.randrange(700)}\ud800é"
        assert (text in ours) == (text in theirs)
        assert ours.add(text) == (text in theirs)
        theirs.add(text)
    assert len(ours) == len(theirs)
