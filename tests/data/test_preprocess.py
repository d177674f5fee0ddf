"""Labels: for every template and kind of tokenizer, decoding what is supervised gives the answers, and nothing else."""

import random

import pytest

from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sv.conversation import get_template, render
from llava_sv.data.preprocess import check_tokenizer, preprocess, supervised_tokens
from llava_sv.data.records import check_record
from llava_sv.errors import UserError
from llava_sv.mm_utils import EncodedPrompt, tokenizer_image_token
from tests.data.samples import exchange, text_only, with_image
from tests.tokenizers_util import chatml_tokenizer, llama_2_tokenizer, llama_3_tokenizer

KINDS = {
    "llama_3": llama_3_tokenizer,
    "llama_3_adds_no_bos": lambda: llama_3_tokenizer(adds_bos=False),
    "llama_3_trims_offsets": lambda: llama_3_tokenizer(trim_offsets=True),
    "llama_2": llama_2_tokenizer,
    "chatml": chatml_tokenizer,
}
PAIRS = [
    ("llama_3", "llama_3"),
    ("llama_3", "plain"),
    ("llama_3_adds_no_bos", "llama_3"),
    ("llama_3_trims_offsets", "llama_3"),
    ("llama_3_trims_offsets", "plain"),
    ("llama_2", "v1"),
    ("llama_2", "llama_2"),
    ("llama_2", "mistral_instruct"),
    ("llama_2", "plain"),
    ("chatml", "chatml"),
    ("chatml", "plain"),
]
ANSWERS = ["It is réd 日本 \U0001f600.", "Two,\nor three.", "Red"]
RECORDS = {
    "one image, three turns": {
        "id": 1,
        "image": "a",
        "conversations": exchange("<image>\nWhat is it?", ANSWERS[0])
        + exchange("How many?", ANSWERS[1])
        + exchange("Colour?", ANSWERS[2]),
    },
    "two images, in the middle and at the end": with_image(2, ["a", "b"], "Is <image> like this? <image>", ANSWERS[0]),
    "an image in a later turn": {
        "id": 3,
        "image": "a",
        "conversations": exchange("Hello", "Hi there.") + exchange("And <image>", ANSWERS[1]),
    },
    "text only": text_only(4, answer=ANSWERS[1]),
    "blanks around": text_only(5, " How? ", f"  {ANSWERS[2]}\n"),
}


def _runs(sample):
    """The supervised ids, run by run."""
    runs, open_run = [], False
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist()):
        if label != IGNORE_INDEX:
            assert label == token
            runs = runs if open_run else [*runs, []]
            runs[-1].append(label)
        open_run = label != IGNORE_INDEX
    return runs


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_exactly_the_answers_are_supervised(kind, name, record):
    tokenizer, template = KINDS[kind](), get_template(name)
    checked = check_record(RECORDS[record], "f")
    sample = preprocess(checked, tokenizer, template)
    assert sample["input_ids"].shape == sample["labels"].shape
    said = [turn["value"].strip() for turn in checked.turns if turn["from"] == "gpt"]
    runs = _runs(sample)
    decoded = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
    if name == "plain":  # answers follow each other, with at most images between them
        assert "".join(decoded) == "".join(f"{answer}\n" for answer in said)
    else:
        assert [text.replace(template.stop_token, "").strip() for text in decoded] == said
    if template.stop_token is not None:
        stop = tokenizer.convert_tokens_to_ids(template.stop_token)
        assert [run.count(stop) for run in runs] == [1] * len(said)
        assert all(run[-1] == stop for run in runs)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_ids_are_those_of_the_prompt_at_inference(kind, name, record):
    """Training and chat tokenise alike: the whole text, and, up to its answers, the prompt."""
    tokenizer, template = KINDS[kind](), get_template(name)
    checked = check_record(RECORDS[record], "f")
    ids = preprocess(checked, tokenizer, template)["input_ids"].tolist()
    assert ids == tokenizer_image_token(render(template, checked.turns).text, tokenizer)
    assert ids.count(IMAGE_TOKEN_INDEX) == len(checked.images)
    prompt = tokenizer_image_token(render(template, checked.turns[:-1], add_generation_prompt=True).text, tokenizer)
    if kind == "llama_2" and name == "plain":
        return  # its blank before a text merges with the caption's first word, or stands alone
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_one_bos_leads(kind, name):
    tokenizer, template = KINDS[kind](), get_template(name)
    for raw in RECORDS.values():
        checked = check_record(raw, "f")
        ids = preprocess(checked, tokenizer, template)["input_ids"].tolist()
        if tokenizer.bos_token_id is None:
            continue
        # LLaMA-2's format itself begins every exchange with one
        expected = len(checked.turns) // 2 if name == "llama_2" else 1
        assert ids.count(tokenizer.bos_token_id) == expected
        assert ids[0] == tokenizer.bos_token_id


def test_supervised_tokens_by_hand():
    #           bos     before  cut in  inside  end     blank   after   2nd     blank of 2nd's end
    offsets = [(0, 0), (0, 3), (2, 5), (5, 6), (6, 8), (8, 8), (8, 9), (9, 12), (12, 12)]
    flags = supervised_tokens(EncodedPrompt([0] * 9, offsets), [(3, 8), (9, 12)])
    assert flags.tolist() == [False, False, True, True, True, True, False, True, True]
    assert supervised_tokens(EncodedPrompt([0], [(0, 4)]), []).tolist() == [False]


def test_supervised_tokens_beside_a_plain_loop():
    """Any spans in order, any offsets, empty ones among both."""
    rng = random.Random(0)
    for _ in range(300):
        cuts = sorted(rng.choices(range(40), k=2 * rng.randint(0, 5)))
        spans = list(zip(cuts[::2], cuts[1::2]))
        offsets = [(start, start + rng.choice((0, 1, 1, 2, 5))) for start in (rng.randint(0, 42) for _ in range(60))]
        wanted = [
            any((a < last and b > first) or (a == b and first < a <= last) for first, last in spans) for a, b in offsets
        ]
        assert supervised_tokens(EncodedPrompt([0] * 60, offsets), spans).tolist() == wanted


def test_a_marker_in_an_answer_does_not_end_it_twice():
    tokenizer, template = llama_2_tokenizer(), get_template("v1")
    sample = preprocess(check_record(text_only(1, answer="a</s>b"), "f"), tokenizer, template)
    assert sample["labels"].tolist().count(tokenizer.eos_token_id) == 1
    assert sample["labels"][-1] == tokenizer.eos_token_id


def test_a_template_of_another_language_model_is_refused():
    with pytest.raises(UserError, match=r"template 'llama_3' needs the token '<\|begin_of_text\|>', which tokenizer"):
        check_tokenizer(llama_2_tokenizer(), get_template("llama_3"))
    with pytest.raises(UserError, match=r"template 'vicuna_v1' needs the token '</s>'"):
        check_tokenizer(llama_3_tokenizer(), get_template("v1"))
    check_tokenizer(llama_3_tokenizer(), get_template("plain"))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False
        name_or_path = "slow/llm"

    with pytest.raises(UserError, match="tokenizer 'slow/llm' is not a fast one"):
        check_tokenizer(Slow(), get_template("plain"))
