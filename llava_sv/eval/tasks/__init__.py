"""The benchmarks by name. A new one is a file here and a line in `TASKS`."""

from __future__ import annotations

from llava_sv.errors import UserError
from llava_sv.eval.tasks import toy
from llava_sv.eval.tasks.base import Task

TASKS: dict[str, Task] = {
    "toy": toy.TASK,
}


def get_task(name: str) -> Task:
    """Look a benchmark up by its exact name; `UserError` lists the known ones."""
    if name not in TASKS:
        raise UserError(f"--task: unknown benchmark {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
