"""What a benchmark is to the answer loop: questions, how to ask them, when an answer is right, and what guessing gives.

A benchmark is one file beside this one, with a `TASK`; `tasks/__init__.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: str
    images: tuple[Path, ...]
    text: str
    """What the user says, without image marks."""
    category: str
    answer: str
    choices: tuple[str, ...] = ()
    """Every answer the wording admits; empty where the question is open."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only this benchmark's scorer needs."""


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    load: Callable[[Path], list[Question]]
    """Read the questions from a folder; `UserError` where they are not there."""
    prompt: Callable[[Question], str]
    """What the model is asked."""
    is_correct: Callable[[Question, str], bool]
    """Whether an answer counts."""
    default_data_path: str
    """Where the benchmark lies unless `--data-path` says otherwise."""
    max_new_tokens: int = 16
    """Longest answer."""


def chance_level(questions: list[Question]) -> float:
    """Share that uniform guessing among each question's admitted answers gets right (0 for an open question)."""
    return sum(1 / len(question.choices) for question in questions if question.choices) / len(questions)


def accuracy(task: Task, questions: list[Question], answers: dict[str, str]) -> dict[str, Any]:
    """`accuracy` over all questions, `per_category`, and `questions` (their number). `answers`: question id -> text."""
    if not questions:
        raise ValueError("no questions to score")
    right: dict[str, list[bool]] = {}
    for question in questions:
        right.setdefault(question.category, []).append(task.is_correct(question, answers[question.id]))
    return {
        "accuracy": sum(map(sum, right.values())) / len(questions),
        "per_category": {category: sum(marks) / len(marks) for category, marks in right.items()},
        "questions": len(questions),
    }


def chance(questions: list[Question]) -> dict[str, Any]:
    """`accuracy` and `per_category` of uniform guessing, in the shape of `accuracy`."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.category, []).append(question)
    return {
        "accuracy": chance_level(questions),
        "per_category": {category: chance_level(group) for category, group in groups.items()},
    }
