"""5,000 mutated records and pictures thrown at `data check` and at the training loader, from a seed.

Each mutation says itself what must come of it: `harmful` (check must name the line, training must not see it),
`harmless` (the record must come through, byte for byte), or `either` (damage that may or may not show: it must only not
crash). The two never look at what check thinks.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from llava_sv import cli
from llava_sv.conversation import get_template
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.data.dataset import LazySupervisedDataset
from llava_sv.data.index import open_index
from llava_sv.errors import UserError
from tests.data.mutations import HARMFUL, HARMLESS, MUTATIONS, damaged_picture, encoded, good_record
from tests.data.samples import data_args, exchange, image_processor
from tests.tokenizers_util import llama_3_tokenizer

IMAGES = 40


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
        suffix, data = encoded(rng)
        fate[f"{number}.{suffix}"] = HARMLESS
        (folder / "images" / f"{number}.{suffix}").write_bytes(data)
    good_images = sorted(fate)
    outcomes, texts, mutated = [], [], 0
    for number in range(records):
        record = good_record(rng, number, good_images)
        luck = rng.random()
        mutated += luck < damage
        if luck < damage * 0.6:
            outcome, text = rng.choice(MUTATIONS)(rng, record)
        elif luck < damage:
            suffix, data, outcome = damaged_picture(rng)
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
        good = [good_record(rng, 10 * number + index, ["a.png"]) for index in range(3)]
        mutate = MUTATIONS[number % len(MUTATIONS)]
        outcome, text = mutate(rng, good_record(rng, 10 * number + 5, ["a.png"]))
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
        suffix, data, outcome = damaged_picture(rng) if number % 2 else (*encoded(rng), HARMLESS)
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
