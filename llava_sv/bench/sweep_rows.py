"""Rows of a sweep in a file: each written as it is measured, none measured twice. Called by `bench sweep`.

A row is known by what ran, its settings and the environment but for the date; rows of other settings or machines in the
same file stay there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sv.bench.flags import Job
from llava_sv.errors import UserError
from llava_sv.files import read_json, write_json

KIND = "llava-sv bench sweep"


class Rows:
    """The file at `path`, or rows in memory alone where it is None. `UserError` for a file that is no sweep's."""

    def __init__(self, path: str | None, anew: bool = False):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None or anew or not Path(path).exists():
            return
        try:
            found = read_json(path, KIND)
        except UserError:  # no JSON, so none of ours
            found = None
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise UserError(f"--json {path}: exists and is no sweep's; give another name, or --overwrite")
        self.rows = found["rows"]

    def find(self, what: str, job: Job, environment: dict[str, Any]) -> dict[str, Any] | None:
        """The row of this measurement, where it was made on such a machine already."""
        wanted = key_of(what, job.settings, environment)
        return next(
            (row for row in self.rows if key_of(row["what"], row["settings"], row["environment"]) == wanted), None
        )

    def add(self, what: str, job: Job, environment: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
        """Keep a report, in the file at once; returns its row."""
        row = {"what": what, "settings": job.settings, "environment": environment, "report": report}
        self.rows.append(row)
        if self.path is not None:
            write_json(self.path, {"kind": KIND, "rows": self.rows})
        return row


def key_of(what: str, settings: dict[str, Any], environment: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two measurements the same."""
    machine = {name: value for name, value in environment.items() if name != "date"}
    return what, sorted(settings.items(), key=str), sorted(machine.items(), key=str)
