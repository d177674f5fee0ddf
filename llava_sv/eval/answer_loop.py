"""The answer loop: a benchmark's questions go in by batches, answers come out as lines of a JSONL file, at once.

A loop that was stopped goes on where the file ends, unless model or settings changed. Called by `eval.cli`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_sv.errors import UserError
from llava_sv.eval.retained import take, watching
from llava_sv.eval.tasks.base import Question, Task
from llava_sv.files import write_json
from llava_sv.generation import Assistant, decode, generate, make_batch, user_turn
from llava_sv.mm_utils import load_image


@dataclass(frozen=True)
class AnswerSettings:
    """What an answer depends on beside the model and the question."""

    batch_size: int = 16
    blind: bool = False
    """Ask without the image."""
    skip_kv: str | None = None
    """Level of the skip KV-cache; None is the checkpoint's own."""
    max_new_tokens: int | None = None
    """None is the benchmark's own."""
    num_workers: int = 0
    """Processes that read images ahead."""


def fingerprint(model_path: str, task_name: str, settings: AnswerSettings) -> dict[str, Any]:
    """What must be equal for an answers file to be continued: benchmark, model and its weights' dates, settings."""
    folder = Path(model_path)
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")) if folder.is_dir() else []
    return {
        "task": task_name,
        "model_path": model_path,
        "weights": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights},
        "blind": settings.blind,
        "skip_kv": settings.skip_kv,
        "max_new_tokens": settings.max_new_tokens,
    }


def resume(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Answers (question id -> text) that `path` holds already, made with these very `settings`; else an empty file.

    The settings lie beside it (`*.settings.json`). A last line that was cut short by a crash is taken away.
    """
    beside = path.with_suffix(".settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    same = path.is_file() and beside.is_file() and json.loads(beside.read_text(encoding="utf-8")) == settings
    if not same:
        path.write_bytes(b"")
        write_json(beside, settings)
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["question_id"]: row["text"] for row in rows}


def answer_questions(
    assistant: Assistant, task: Task, questions: list[Question], path: Path, settings: AnswerSettings, made_by: dict
) -> tuple[dict[str, str], float]:
    """Ask every question that `path` does not answer yet; append each batch's answers to `path` at once.

    made_by: `fingerprint` of this run. Returns question id -> text of all questions, and the seconds this call took.
    """
    known = resume(path, made_by)
    answers = {question.id: known[question.id] for question in questions if question.id in known}
    left = [question for question in questions if question.id not in answers]
    if not settings.blind and any(q.images for q in left) and not assistant.has_vision:
        raise UserError("this model has no vision tower; ask without images (--blind), or give a LLaVA checkpoint")
    loader: DataLoader = DataLoader(
        left,  # type: ignore[arg-type]
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        collate_fn=lambda batch: (batch, [[] if settings.blind else [load_image(p) for p in q.images] for q in batch]),
    )
    started = time.perf_counter()
    bar = tqdm(total=len(questions), initial=len(answers), unit="question", desc=made_by["task"], dynamic_ncols=True)
    with bar, watching(assistant.model) as counts, open(path, "a", encoding="utf-8") as file:
        for batch, images in loader:
            texts = answer_batch(assistant, task, batch, images, settings)
            for question, text, more in zip(batch, texts, take(counts, images)):
                answers[question.id] = text
                file.write(json.dumps(_row(task, question, text) | more, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    return answers, time.perf_counter() - started


def answer_batch(
    assistant: Assistant, task: Task, batch: list[Question], images: list[list], settings: AnswerSettings
) -> list[str]:
    """Greedy answers of one batch. images: those of each question (empty lists when blind)."""
    conversations = [[user_turn(task.prompt(q), len(pictures))] for q, pictures in zip(batch, images)]
    tokens = generate(
        assistant,
        make_batch(assistant, conversations, images),
        skip_kv=settings.skip_kv,
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        do_sample=False,
    )
    return decode(assistant, tokens)


def _row(task: Task, question: Question, text: str) -> dict[str, Any]:
    """One line of the answers file; the first three names are LLaVA's."""
    return {
        "question_id": question.id,
        "prompt": task.prompt(question),
        "text": text,
        "category": question.category,
        "answer": question.answer,
        "correct": task.is_correct(question, text),
    }
