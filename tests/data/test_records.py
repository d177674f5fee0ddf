"""Every way a record can be wrong, with its message; and the ways in which it may differ."""

import pytest

from llava_sv.data.records import LlavaRecord, as_json, check_record
from llava_sv.errors import UserError
from tests.data.samples import exchange, text_only, with_image

ASK, SAY = exchange("Who?", "Me.")


def test_one_image_several_images_and_none():
    assert check_record(with_image(7), "f") == LlavaRecord(
        "7", ("a.png",), tuple(exchange("<image>\nWhat is it?", "A square."))
    )
    two = with_image("x", ["a.png", "b.png"], "Compare <image> with <image>.")
    assert check_record(two, "f").images == ("a.png", "b.png")
    assert check_record(text_only("t"), "f").images == ()
    assert check_record({**text_only("t"), "image": None, "model": "extra fields are no matter"}, "f").images == ()
    assert check_record({"conversations": [ASK, SAY]}, "f").id == ""


def test_what_leads_or_trails_without_its_pair_is_dropped():
    assert check_record({"conversations": [SAY, ASK, SAY]}, "f").turns == (ASK, SAY)
    assert check_record({"conversations": [ASK, SAY, ASK]}, "f").turns == (ASK, SAY)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], r"data\.json line 3: expected a record \(a JSON object\), found a list"),
        ({"id": "r"}, r"data\.json line 3: record 'r': has no field 'conversations'"),
        ({"id": 5, "conversations": "hi"}, r"record 5: field 'conversations' is text; expected a list"),
        ({"id": 5, "conversations": []}, r"record 5: field 'conversations' holds no question with an answer"),
        ({"conversations": [ASK]}, r"line 3: field 'conversations' holds no question with an answer"),
        ({"conversations": ["hi"]}, r"conversations\[0\] is text; expected an object with 'from' and 'value'"),
        ({"conversations": [ASK, {"from": "gpt"}]}, r"conversations\[1\]: field 'value' is missing; expected text"),
        ({"conversations": [ASK, {"from": "gpt", "value": 3}]}, r"conversations\[1\]: field 'value' is a number"),
        ({"conversations": [{"from": "bot", "value": ""}]}, r"unknown speaker 'bot'; known: human, gpt"),
        ({"conversations": [ASK, ASK, SAY]}, r"conversations\[1\] is the second 'human' turn in a row"),
        ({"conversations": [SAY, ASK, SAY, SAY]}, r"conversations\[3\] is the second 'gpt' turn in a row"),
        (with_image("r", answer="see <image>"), r"record 'r': conversations\[1\] is an answer with <image> in it"),
        (with_image("r", question="What?"), r"record 'r': 1 image in field 'image' but 0 <image> in the conversation"),
        (with_image("r", ["a", "b"]), r"record 'r': 2 images in field 'image' but 1 <image> in the conversation"),
        (text_only("r", "<image> what?"), r"record 'r': 0 images in field 'image' but 1 <image> in the conversation"),
        (with_image("r", 5), r"record 'r': field 'image' is a number; expected a path or a list of paths"),
        (with_image("r", ["a", 5]), r"field 'image' is a list with something else than text in it"),
    ],
)
def test_message(raw, message):
    with pytest.raises(UserError, match=message):
        check_record(raw, "data.json line 3")


@pytest.mark.parametrize("raw", [with_image("a"), text_only("b"), {"conversations": text_only("c")["conversations"]}])
def test_a_record_as_json_is_the_value_it_was_made_of(raw):
    assert as_json(check_record(raw, "here")) == raw
    assert as_json(check_record(raw, "here"), "mine") == {**raw, "source": "mine"}
