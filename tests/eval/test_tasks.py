"""The toy benchmark's file, its scorer, and what guessing gives; against hand-computed values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sv.errors import UserError
from llava_sv.eval.tasks import TASKS, get_task
from llava_sv.eval.tasks import toy as toy_task
from llava_sv.eval.tasks.base import Question, accuracy, chance

TASK = TASKS["toy"]


def question(name: str, category: str, answer: str, choices: tuple[str, ...] = ("yes", "no")) -> Question:
    return Question(name, (Path("x.png"),), "?", category, answer, choices)


def test_a_drawn_benchmark_loads_with_every_image_there(bench):
    questions = TASK.load(bench)
    assert len(questions) == 12
    assert {q.category for q in questions} == {"existence", "colour", "shape", "count", "position", "text"}
    assert all(path.is_file() for q in questions for path in q.images)
    assert all(q.answer in q.choices for q in questions)
    assert len({q.id for q in questions}) == 12


def test_a_folder_without_benchmark_says_how_to_draw_one(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*bench\.jsonl; draw the toy data with: llava-sv data toy"):
        TASK.load(tmp_path)


ROW = {"id": "a", "image": "a.png", "category": "count", "question": "?", "answer": "2"}


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"id": }', r"bench\.jsonl, line 2, column 8: not JSON"),
        (json.dumps({k: v for k, v in ROW.items() if k not in ("image", "answer")}), "line 2: no field image, answer"),
    ],
)
def test_a_broken_line_is_named(tmp_path, second_line, message):
    (tmp_path / "bench.jsonl").write_text(json.dumps(ROW) + "\n" + second_line + "\n")
    with pytest.raises(UserError, match=message):
        TASK.load(tmp_path)


def test_an_empty_benchmark_is_refused(tmp_path):
    (tmp_path / "bench.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no questions in it"):
        TASK.load(tmp_path)


@pytest.mark.parametrize(
    ("said", "meant", "right"),
    [
        ("Yes", "yes", True),
        ("yes.", "yes", True),
        ("A red  circle!", "red circle", True),
        ("top-left", "top left", True),
        ("yes no", "yes", False),
        ("", "yes", False),
        ("3", "2", False),
        ("12", "1", False),
    ],
)
def test_exact_match_forgives_case_articles_and_punctuation_only(said, meant, right):
    assert toy_task.is_correct(question("q", "c", meant), said) is right


def test_accuracy_per_category_and_over_all_questions():
    questions = [
        question("1", "a", "yes"),
        question("2", "a", "no"),
        question("3", "a", "no"),
        question("4", "b", "no"),
    ]
    result = accuracy(TASK, questions, {"1": "yes", "2": "yes", "3": "No.", "4": "yes"})
    assert result == {"accuracy": 0.5, "per_category": {"a": pytest.approx(2 / 3), "b": 0.0}, "questions": 4}


def test_chance_is_uniform_guessing_among_the_choices():
    questions = [question("1", "a", "yes"), question("2", "a", "1", ("0", "1", "2", "3")), question("3", "b", "x", ())]
    result = chance(questions)
    assert result["per_category"] == {"a": (1 / 2 + 1 / 4) / 2, "b": 0.0}
    assert result["accuracy"] == pytest.approx(0.25)


def test_unknown_benchmark_lists_the_known():
    with pytest.raises(UserError, match="unknown benchmark 'mme'; known: toy"):
        get_task("mme")
