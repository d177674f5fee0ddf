"""The toy benchmark that `llava-sv data toy` draws: six or seven categories, one-word answers, exact match.

FOLDER/bench.jsonl arrives (one object a line: id, image, category, question, answer, choices), `Question`s leave.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError
from llava_sv.eval.tasks.base import Question, Task

FIELDS = ("id", "image", "category", "question", "answer")


def load(folder: Path) -> list[Question]:
    """Questions of `folder`/bench.jsonl (or of a file of that format), images under `folder`/images.

    `UserError` names file, line and field.
    """
    path = folder if folder.is_file() else folder / "bench.jsonl"
    folder = path.parent
    if not path.is_file():
        raise UserError(f"no such file: {path}; draw the toy data with: llava-sv data toy --output {folder}")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, column {error.colno}: not JSON ({error.msg})") from error
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise UserError(f"{path}, line {number}: no field {', '.join(missing)}")
        questions.append(_question(row, folder))
    if not questions:
        raise UserError(f"{path}: no questions in it; draw the toy data again: llava-sv data toy --output {folder}")
    return questions


def _question(row: dict[str, Any], folder: Path) -> Question:
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return Question(
        id=str(row["id"]),
        images=tuple(folder / "images" / name for name in names),
        text=row["question"],
        category=row["category"],
        answer=row["answer"],
        choices=tuple(row.get("choices") or ()),
    )


def prompt(question: Question) -> str:
    """The question as it stands in the file: it already asks for a short answer."""
    return question.text


def normalise(text: str) -> str:
    """Lower case, no article, no punctuation around the words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def is_correct(question: Question, answer: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(answer) == normalise(question.answer)


TASK = Task(
    load=load,
    prompt=prompt,
    is_correct=is_correct,
    default_data_path="playground/data/toy",
)
