"""The toy data set: what it says about a picture is what was drawn, the same seed gives the same bytes, and a blind
guess is weak."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sv.data import toy, toy_questions, toy_scene
from llava_sv.data.toy_scene import COLOURS, PLACES, SHAPES, WORDS
from llava_sv.errors import UserError

SEED, TRAIN, BENCH = 5, 60, 120
NO_FINE = ["--fine-train", "0", "--fine-bench", "0"]
FINE_TRAIN, FINE_BENCH = 20, 64

SIX_CATEGORIES = {
    "bench.jsonl": "914220064f7b878e15846f9c934b49ae7a8058f2a8d72d552dbaae6f809b0564",
    "pretrain.json": "546a5777fd1f8d7133dfad5151842be32cbdae32501e053e7973fb41ba18f81c",
    "sft.json": "93914a33e8c72bff607f9d108a83315d9abe2b0c6786c779f8cb22fe328d7619",
}
"""SHA-256 of `--seed 3 --train 30 --bench 24` without fine detail, as it was before there was any."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("toy")
    assert toy.main([*_arguments(output, SEED), *NO_FINE]) == 0
    return output


@pytest.fixture(scope="module")
def with_fine(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("fine")
    assert toy.main([*_arguments(output, SEED), *_fine_flags(FINE_TRAIN, FINE_BENCH)]) == 0
    return output


def _arguments(output: Path, seed: int) -> list[str]:
    return ["--output", str(output), "--seed", str(seed), "--train", str(TRAIN), "--bench", str(BENCH)]


def _fine_flags(train: int, bench: int) -> list[str]:
    return ["--fine-train", str(train), "--fine-bench", str(bench)]


@pytest.fixture(scope="module")
def bench(folder) -> list[dict]:
    return _lines(folder)


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]


def _records(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name).read_text())


def _images(record: dict) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def answer_from_caption(caption: str, question: str) -> str:
    """An independent reader: works the answer out of the caption's words alone."""
    shapes = re.findall(r"(\w+) (\w+) at the (top left|top right|bottom left|bottom right)", caption)
    word = re.search(r"the word (\w+)", caption)
    question = question.split("\n")[0]
    if match := re.fullmatch(r"Is there an? (\w+) (\w+) in the image\?", question):
        return "yes" if any((c, s) == match.groups() for c, s, _ in shapes) else "no"
    if match := re.fullmatch(r"What colour is the shape at the ([\w ]+)\?", question):
        return next(c for c, _, p in shapes if p == match[1])
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        (colour,) = [c for c, s, _ in shapes if s == match[1]]
        return colour
    if match := re.fullmatch(r"What shape is at the ([\w ]+)\?", question):
        return next(s for _, s, p in shapes if p == match[1])
    if match := re.fullmatch(r"What shape is the (\w+) object\?", question):
        (shape,) = [s for c, s, _ in shapes if c == match[1]]
        return shape
    if question == "How many shapes are there?":
        return str(len(shapes))
    if match := re.fullmatch(r"How many (\w+) shapes are there\?", question):
        return str(sum(c == match[1] for c, _, _ in shapes))
    if match := re.fullmatch(r"How many (\w+?)e?s are there\?", question):
        return str(sum(s.startswith(match[1]) for _, s, _ in shapes))
    if match := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        return next(p for c, s, p in shapes if (c, s) == match.groups())
    if match := re.fullmatch(r"Is the (\w+) (\w+) at the (\w+)\?", question):
        return "yes" if match[3] in next(p for c, s, p in shapes if (c, s) == match.groups()[:2]).split() else "no"
    assert question == "What word is written in the image?", question
    assert word is not None
    return word[1]


def test_same_seed_same_bytes_other_seed_other_pictures(with_fine, tmp_path):
    toy.main([*_arguments(tmp_path / "a", SEED), *_fine_flags(FINE_TRAIN, FINE_BENCH)])
    assert _digest(tmp_path / "a") == _digest(with_fine)
    toy.main([*_arguments(tmp_path / "b", 6), *_fine_flags(FINE_TRAIN, FINE_BENCH)])
    same = [name for name, digest in _digest(tmp_path / "b").items() if digest == _digest(with_fine).get(name)]
    assert same == []


def test_a_longer_set_begins_with_the_shorter_one(folder, tmp_path):
    toy.main(["--output", str(tmp_path), "--seed", str(SEED), "--train", str(2 * TRAIN), "--bench", "6", *NO_FINE])
    assert _records(tmp_path, "pretrain.json")[:TRAIN] == _records(folder, "pretrain.json")
    name = _records(folder, "pretrain.json")[0]["image"]
    assert (tmp_path / "images" / name).read_bytes() == (folder / "images" / name).read_bytes()


def test_every_answer_follows_from_the_caption(folder, bench):
    captions = {r["image"]: r["conversations"][1]["value"] for r in _records(folder, "pretrain.json")}
    checked = Counter()
    for record in _records(folder, "sft.json"):
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        told = [captions[name] for name in _images(record)]
        opening, first = turns[0]["value"].split("\n", 1) if len(told) < 2 else ("", turns[0]["value"][16:])
        told = told or [opening]
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            question = first if asked is turns[0] else asked["value"]
            order = re.match(r"In the (first|second) image: ", question)
            caption = told[1] if order and order[1] == "second" else told[0]
            question = question[order.end() :] if order else question
            if question.startswith("Is there"):
                question = question.replace(" in the image", "").replace("?", " in the image?", 1)
            question = question.replace("written?", "written in the image?")
            assert answer_from_caption(caption, question) == answer["value"], (caption, question)
            checked[len(_images(record))] += 1
    assert min(checked[0], checked[1], checked[2]) > 20

    items = toy.bench_items(SEED, BENCH, _train_signatures())
    for line, (_, scene, _) in zip(bench, items, strict=True):
        assert answer_from_caption(toy_scene.describe(scene), line["question"]) == line["answer"]
        assert line["answer"] in line["choices"]


def _train_signatures() -> set[tuple]:
    return {toy.scene_of(SEED, "train", i).signature for i in range(TRAIN)}


def test_pictures_show_what_the_records_say(folder):
    for number in range(TRAIN):
        scene = toy.scene_of(SEED, "train", number)
        record = _records(folder, "pretrain.json")[number]
        with Image.open(folder / "images" / record["image"]) as image:
            assert image.size == scene.size
            assert image.format == ("PNG" if record["image"].endswith("png") else "JPEG")
            pixels = np.asarray(image.convert("RGB")).astype(int)
        for shape in scene.shapes:
            x, y = shape.centre[0] * image.width, shape.centre[1] * image.height
            r = shape.radius * min(image.size)
            # the middle of every shape is filled, but a ring's: there, look at its rim
            dx, dy = (0, -0.77 * r) if shape.shape == "ring" else (0, 0)
            seen = pixels[int(y + dy), int(x + dx)]
            others = [s for s in scene.shapes if s is not shape]
            covered = any(np.hypot(s.centre[0] * image.width - x - dx, s.centre[1] * image.height - y - dy) < 1.3 * r
                          for s in others)  # fmt: skip
            nearest = min(COLOURS, key=lambda c: np.abs(seen - COLOURS[c]).sum())
            assert covered or nearest == shape.colour, (number, shape, seen)
            row = PLACES[shape.place].split()
            assert (shape.centre[0] < 0.5) == (row[1] == "left")
            assert (shape.centre[1] < 0.5) == (row[0] == "top")


def test_the_word_changes_its_band_and_nothing_else():
    scene = next(s for s in (toy.scene_of(1, "train", i) for i in range(99)) if s.word == "owl")
    with_word, without = (np.asarray(toy_scene.render(s)).astype(int) for s in (scene, replace(scene, word=None)))
    rows = np.flatnonzero(np.abs(with_word - without).sum(axis=(1, 2)))
    band = toy_scene.WORD_BAND * scene.size[1]
    centre = scene.word_centre[1] * scene.size[1]
    assert rows.size > 5
    assert abs(rows - centre).max() <= band / 2 + 1


def test_scenes_vary():
    scenes = [toy.scene_of(0, "train", i) for i in range(600)]
    assert {len(s.shapes) for s in scenes} == {1, 2, 3, 4}
    assert {s.colour for scene in scenes for s in scene.shapes} == set(COLOURS)
    assert {s.shape for scene in scenes for s in scene.shapes} == set(SHAPES)
    assert {s.word for s in scenes} == {*WORDS, None}
    ratios = [s.size[0] / s.size[1] for s in scenes]
    assert min(ratios) < 0.85
    assert max(ratios) > 1.15
    overlapping = sum(
        any(abs(a.centre[0] - b.centre[0]) < a.radius + b.radius and abs(a.centre[1] - b.centre[1]) < 0.1
            for i, a in enumerate(s.shapes) for b in s.shapes[:i])
        for s in scenes
    )  # fmt: skip
    assert overlapping > 60


def test_bench_is_balanced_and_a_blind_guess_is_weak(bench):
    assert Counter(line["category"] for line in bench) == dict.fromkeys(toy_questions.CATEGORIES, BENCH // 6)
    questions = [toy_questions.Question(q["category"], q["question"], q["answer"], tuple(q["choices"])) for q in bench]
    blind = toy_questions.blind_accuracy(questions)
    assert set(blind) == set(toy_questions.CATEGORIES)
    assert max(blind.values()) <= 0.5
    assert sum(blind.values()) / 6 <= 0.36


def test_bench_is_held_out(folder):
    train = _train_signatures()
    items = list(toy.bench_items(SEED, BENCH, train))
    assert len(items) == BENCH
    assert train.isdisjoint(scene.signature for _, scene, _ in items)
    used = {name for record in _records(folder, "sft.json") for name in _images(record)}
    assert not any(name.startswith("bench") for name in used)


def test_records_and_images_agree(folder, bench):
    present = {p.name for p in (folder / "images").iterdir()}
    records = _records(folder, "sft.json") + _records(folder, "pretrain.json")
    for record in records:
        text = "".join(t["value"] for t in record["conversations"])
        assert text.count("<image>") == len(_images(record))
        assert present.issuperset(_images(record))
    assert present == {n for r in records for n in _images(r)} | {line["image"] for line in bench}
    assert len({r["id"] for r in _records(folder, "sft.json")}) == len(_records(folder, "sft.json"))


def test_without_fine_detail_all_is_as_it_was(tmp_path):
    toy.main(["--output", str(tmp_path), "--seed", "3", "--train", "30", "--bench", "24", *NO_FINE])
    assert {name: digest for name, digest in _digest(tmp_path).items() if "/" not in name} == SIX_CATEGORIES


def test_fine_detail_leaves_the_rest_alone(folder, with_fine):
    captions, conversations = (_records(with_fine, name) for name in ("pretrain.json", "sft.json"))
    assert captions[:TRAIN] == _records(folder, "pretrain.json")
    assert [r for r in conversations if not r["id"].startswith("toy-fine")] == _records(folder, "sft.json")
    assert _lines(with_fine)[:BENCH] == _lines(folder)
    plain, fine = _digest(folder / "images"), _digest(with_fine / "images")
    assert {name: digest for name, digest in fine.items() if not name.startswith("fine")} == plain
    assert len(fine) == len(plain) + FINE_TRAIN + FINE_BENCH


def test_fine_records_ask_for_the_word_and_every_shape(with_fine):
    scenes = [toy.fine_scene_of(SEED, "train", i) for i in range(FINE_TRAIN)]
    captions = {r["id"]: r for r in _records(with_fine, "pretrain.json")[TRAIN:]}
    conversations = {r["id"]: r for r in _records(with_fine, "sft.json") if r["id"].startswith("toy-fine")}
    assert list(captions) == [f"toy-fine-{i}" for i in range(FINE_TRAIN)]
    assert set(conversations) == set(captions)
    first = Counter()
    for scene, (name, caption) in zip(scenes, captions.items(), strict=True):
        said = caption["conversations"][1]["value"]
        assert said == toy_scene.describe(scene)
        turns = [turn["value"] for turn in conversations[name]["conversations"]]
        assert conversations[name]["image"] == caption["image"]
        opening, turns[0] = turns[0].split("\n", 1)
        assert opening == "<image>"
        assert turns[0].endswith(toy_questions.ANSWER_PROMPT)
        asked = [turn.split("\n")[0] for turn in turns[::2]]
        assert len(set(asked)) == len(asked) == len(scene.shapes) + 1
        assert [answer_from_caption(said, question) for question in asked] == turns[1::2]
        first[asked[0].split()[1]] += 1
    assert len(first) == 2, "the word comes first at times, a shape at others"


def test_fine_bench_is_balanced_answered_by_its_scenes_and_held_out(with_fine):
    train = {toy.fine_scene_of(SEED, "train", i).signature for i in range(FINE_TRAIN)}
    items = list(toy.fine_bench_items(SEED, FINE_BENCH, train))
    assert train.isdisjoint(scene.signature for _, scene, _ in items)
    lines = _lines(with_fine)[BENCH:]
    forms: dict[str, Counter] = {"word": Counter(), "shape": Counter()}
    for line, (_, scene, _) in zip(lines, items, strict=True):
        assert line["category"] == "fine_detail"
        assert answer_from_caption(toy_scene.describe(scene), line["question"]) == line["answer"]
        form = "word" if line["question"].startswith("What word is written in the image?") else "shape"
        assert tuple(line["choices"]) == {"word": WORDS, "shape": SHAPES}[form]
        forms[form][line["answer"]] += 1
        with Image.open(with_fine / "images" / line["image"]) as image:
            assert image.size == scene.size
    assert forms["word"] == dict.fromkeys(WORDS, 2)
    assert set(forms["shape"].values()) == {5, 6}
    assert sum(forms["shape"].values()) == FINE_BENCH // 2


def test_fine_scenes_are_small_things_in_larger_pictures_that_no_tile_cuts():
    quadrants = Counter()
    for number in range(300):
        scene = toy.fine_scene_of(0, "train", number)
        side = max(scene.size)
        assert 128 <= side <= 192
        assert min(scene.size) >= 0.81 * side
        colours = [shape.colour for shape in scene.shapes]
        assert 2 <= len(colours) == len(set(colours)) <= 4
        assert len({shape.place for shape in scene.shapes}) == len(colours)
        assert all(3.9 < shape.radius * min(scene.size) * 128 / side < 4.8 for shape in scene.shapes)
        blank = replace(scene, shapes=(), word=None)
        taken = np.zeros(scene.size[::-1], dtype=int)
        for thing in [*(replace(blank, shapes=(shape,)) for shape in scene.shapes), replace(blank, word=scene.word)]:
            shown, nothing = (np.asarray(toy_scene.render(s)).astype(int) for s in (thing, blank))
            drawn = np.abs(shown - nothing).sum(axis=2) > 0
            taken += drawn
            rows, columns = np.nonzero(drawn)
            assert 0 < rows.min() <= rows.max() < scene.size[1] - 1
            assert 0 < columns.min() <= columns.max() < scene.size[0] - 1
            middle = (scene.size[1] / 2, scene.size[0] / 2)
            (row,) = {bool(edge > middle[0]) for edge in (rows.min() - 0.5, rows.max() + 1.5)}
            (column,) = {bool(edge > middle[1]) for edge in (columns.min() - 0.5, columns.max() + 1.5)}
            if thing.shapes:
                assert thing.shapes[0].place == 2 * row + column
            else:
                quadrants[row, column] += 1
                assert columns.max() - columns.min() < side / 4
        assert taken.max() == 1, "nothing covers anything else"
    assert len(quadrants) == 4
    assert min(quadrants.values()) > 40


def test_a_quarter_of_the_training_images_and_120_questions_are_fine_unless_told_otherwise(tmp_path, capsys):
    toy.main(["--output", str(tmp_path), "--train", "9", "--bench", "6", "--text-only", "0", "--two-images", "0"])
    assert "11 training images, 11 conversations, 126 benchmark questions" in capsys.readouterr().out
    assert Counter(line["category"] for line in _lines(tmp_path))["fine_detail"] == 120


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--train", "1"), ("--bench", "5"), ("--text-only", "-1"), ("--fine-train", "-1"), ("--fine-bench", "-2")],
)
def test_impossible_numbers_are_refused_by_name(flag, value, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{flag} {value}")):
        toy.main(["--output", str(tmp_path), flag, value])


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="--output"):
        toy.main(["--output", str(tmp_path / "taken"), "--train", "2", "--bench", "6"])


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        toy.main(["--help"])
    assert stopped.value.code == 0
    assert "example:\n  llava-sv data toy" in capsys.readouterr().out
