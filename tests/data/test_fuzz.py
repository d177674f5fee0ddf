"""5,000 mutated records and pictures thrown at `data check` and at the training loader, from a seed.

Each mutation says itself what must come of it: `harmful` (check must name the line, training must not see it),
`harmless` (the record must come through, byte for byte), or `either` (damage that may or may not show: it must only not
crash). The two never look at what check thinks.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sv import cli
from llava_sv.conversation import get_template
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.data.dataset import LazySupervisedDataset
from llava_sv.data.index import open_index
from llava_sv.errors import UserError
from tests.data.samples import data_args, exchange, image_processor
from tests.tokenizers_util import llama_3_tokenizer

HARMFUL, HARMLESS, EITHER = "harmful", "harmless", "either"
IMAGES = 40
SURROGATE = re.compile("[\ud800-\udfff]")
WORDS = ["What", "is", "it?", "réd", "日本", "<b>", "{", "}", '"', "\\", "[1, 2]", "a\nb", "\U0001f600", "'", "\t"]


# -- records ----------------------------------------------------------------------------------------------------------


def _words(rng):
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, 8)))


def _record(rng, number, images):
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


def _encoded(rng, suffix=None):
    suffix = suffix or rng.choice(sorted(FORMATS))
    options = {"progressive": rng.random() < 0.3} if suffix == "jpg" else {}
    file = io.BytesIO()
    _picture(rng).save(file, FORMATS[suffix], **options)
    return suffix, file.getvalue()


def _damaged_picture(rng):
    """(suffix, bytes, what must come of it)."""
    suffix, data = _encoded(rng)
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


# -- a case -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One file of records, each on a line of its own, line 2 on."""

    folder: Path
    outcomes: list[str]
    texts: list[str]
    mutated: int = 0

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def of(self, outcome):
        """(line, text) of the records of which this must come."""
        return [(line, text) for line, (text, said) in enumerate(zip(self.texts, self.outcomes), 2) if said == outcome]

    def write(self, name, array):
        """The records as an array or JSONL: line 1 is the bracket, or a good record of its own."""
        opener = "[" if array else json.dumps({"id": "first", "conversations": exchange("One", "first")})
        body = (",\n" if array else "\n").join(self.texts)
        path = self.folder / name
        path.write_bytes(f"{opener}\n{body}\n{']' if array else ''}\n".encode("utf-8", "surrogateescape"))
        return path


def _case(folder, seed, records, damage):
    """`records` good and mutated ones; a share `damage` of them, and of the pictures, mutated."""
    rng = random.Random(seed)
    (folder / "images" / "folder").mkdir(parents=True)
    fate = {}
    for number in range(IMAGES):
        suffix, data = _encoded(rng)
        fate[f"{number}.{suffix}"] = HARMLESS
        (folder / "images" / f"{number}.{suffix}").write_bytes(data)
    good_images = sorted(fate)
    outcomes, texts, mutated = [], [], 0
    for number in range(records):
        record = _record(rng, number, good_images)
        luck = rng.random()
        mutated += luck < damage
        if luck < damage * 0.6:
            outcome, text = rng.choice(MUTATIONS)(rng, record)
        elif luck < damage:
            suffix, data, outcome = _damaged_picture(rng)
            name = f"bad{number}.{suffix}"
            (folder / "images" / name).write_bytes(data)
            record["image"] = name
            first = record["conversations"][0]
            first["value"] = "<image>\n" + first["value"].replace("<image>\n", "")
            text = json.dumps(record)
        else:
            outcome, text = HARMLESS, json.dumps(record, ensure_ascii=rng.random() < 0.5)
        outcomes.append(outcome)
        texts.append(text)
    return Case(folder, outcomes, texts, mutated)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's words on damaged metadata
        yield


# -- check ------------------------------------------------------------------------------------------------------------


def _check(path, images, folder, *more):
    report, fixed = folder / "report.json", folder / "fixed.jsonl"
    arguments = ["--image-folder", str(images), "--json", str(report), "--fix", str(fixed), "--max-problems", "100000"]
    code = cli.main(["data", "check", str(path), *arguments, *more])
    return code, json.loads(report.read_text()), fixed


@pytest.mark.parametrize(("seed", "array"), [(1, True), (2, False)])
def test_check_names_each_bad_record_and_loses_no_good_one(tmp_path, capsys, monkeypatch, seed, array):
    """Two files of which 1,250 records each, or their pictures, are mutated."""
    monkeypatch.setattr("llava_sv.data.check.PER_KIND", 100_000)
    case = _case(tmp_path, seed, 2000, damage=0.65)
    assert case.mutated >= 1250
    path = case.write("data.json", array)
    before = path.read_bytes()
    code, report, fixed = _check(path, case.images, tmp_path)
    assert code == 0
    assert path.read_bytes() == before
    capsys.readouterr()
    named = {finding["line"] for finding in report["findings"] if finding["severity"] == "error"}
    assert [(line, text[:300]) for line, text in case.of(HARMFUL) if line not in named] == []
    assert [(line, text[:300]) for line, text in case.of(HARMLESS) if line in named] == []
    kept = set(fixed.read_bytes().decode().splitlines())
    lost = [(line, text[:300]) for line, text in case.of(HARMLESS) if text not in kept]
    assert lost == []
    # and what was written is clean
    code, report, _ = _check(fixed, case.images, tmp_path / "again")
    assert code == 0
    assert report["problems"] == 0
    assert report["kinds"].get("duplicate_id", 0) == 0
    capsys.readouterr()


@pytest.mark.parametrize("seed", range(3))
def test_a_file_damaged_anywhere_is_checked_without_a_crash(tmp_path, capsys, seed):
    rng = random.Random(seed)
    case = _case(tmp_path, seed, 60, damage=0.0)
    data = bytearray(case.write("data.json", array=seed % 2 == 0).read_bytes())
    path = tmp_path / "torn.json"
    for _ in range(20):
        torn = bytearray(data)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(2, len(torn))
            kind = rng.randrange(3)
            if kind == 0:
                del torn[at : at + rng.randrange(100)]
            elif kind == 1:
                torn[at] ^= 1 << rng.randrange(8)
            else:
                torn[at:at] = rng.randbytes(rng.randrange(9))
        path.write_bytes(torn)
        lines = torn.decode("utf-8", "surrogateescape").splitlines()
        untouched = [text for text in case.texts if text in {line.rstrip(",") for line in lines}]
        fixed = tmp_path / "fixed.jsonl"
        assert cli.main(["data", "check", str(path), "--no-images", "--fix", str(fixed)]) == 0
        kept = set(fixed.read_text(encoding="utf-8").splitlines())
        # a damaged line may swallow the one behind it where the break between them is gone
        assert [text for text in untouched if text not in kept][1:] == []
    assert "Traceback" not in capsys.readouterr().err


# -- training ---------------------------------------------------------------------------------------------------------


def _records_of(path):
    """Through the index, as training reads them."""
    cache = path.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    return list(open_index(path, cache))


def _tried(call, *arguments):
    """(what it returns, None), or (None, the line that refuses); anything but a `UserError` travels on."""
    try:
        return call(*arguments), None
    except UserError as error:
        return None, str(error)


def _loader(path, case, policy):
    records = open_index(path, case.folder / "cache")
    arguments = data_args(case.images, policy)
    return LazySupervisedDataset(records, _TOKENIZER, image_processor(), arguments, get_template("llama_3"))


_TOKENIZER = llama_3_tokenizer()


def test_training_refuses_a_bad_file_in_one_line(tmp_path):
    """1,600 files of three good records and a mutated one: either all four come through or the file is refused."""
    rng = random.Random(3)
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    for number in range(1600):
        good = [_record(rng, 10 * number + index, ["a.png"]) for index in range(3)]
        mutate = MUTATIONS[number % len(MUTATIONS)]
        outcome, text = mutate(rng, _record(rng, 10 * number + 5, ["a.png"]))
        lines = [json.dumps(good[0]), json.dumps(good[1]), text, json.dumps(good[2])]
        array = number % 2 == 0
        path = tmp_path / "data.json"
        body = "[" + ",\n".join(lines) + "]" if array else "\n".join(lines)
        path.write_bytes(body.encode("utf-8", "surrogateescape"))
        read, said = _tried(_records_of, path)
        if said is not None:
            assert "\n" not in said
            assert len(said) < 2000
            assert outcome != HARMLESS, said
        else:
            # a path may be well-formed and lead nowhere, which only opening it shows
            assert outcome != HARMFUL or "image" in text
            assert [record.id for record in (read[0], read[1], read[-1])] == [str(record["id"]) for record in good]


@pytest.mark.parametrize("policy", ["skip", "blank", "error"])
def test_every_good_record_reaches_training_whatever_pictures_hold(tmp_path, policy):
    """600 records, half with damaged pictures, through the dataset and the collator; others under each policy."""
    rng = random.Random(policy)
    folder = tmp_path / "images"
    folder.mkdir()
    records, outcomes = [], []
    for number in range(600):
        suffix, data, outcome = _damaged_picture(rng) if number % 2 else (*_encoded(rng), HARMLESS)
        (folder / f"{number}.{suffix}").write_bytes(data)
        turns = exchange(f"<image>\n{number}?", "Yes.")
        records.append({"id": str(number), "image": f"{number}.{suffix}", "conversations": turns})
        outcomes.append(outcome)
    case = Case(tmp_path, outcomes, [json.dumps(record) for record in records])
    dataset = _loader(case.write("data.json", array=True), case, policy)
    collate = DataCollatorForSupervisedDataset(_TOKENIZER)
    for number, outcome in enumerate(outcomes):
        sample, said = _tried(dataset.__getitem__, number)
        if said is not None:
            assert policy == "error"
            assert outcome != HARMLESS, said
            assert "\n" not in said
            continue
        if outcome == HARMLESS:
            assert sample["id"] == str(number)
        elif outcome == HARMFUL:
            assert policy != "error"
            assert sample["id"] != str(number) or policy == "blank"
        assert collate([sample])["input_ids"].shape[0] == 1
    problems = dataset.image_problems()
    assert problems["missing"] == 0
    assert problems["corrupt"] >= outcomes.count(HARMFUL)
