"""Rows of a sweep in a file: each written as it is measured, none measured twice. Called by `bench sweep`.

A row is known by what ran, its settings and the environment but for the date; rows of other settings or machines in the
same file stay there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_sv.bench.flags import Job
from llava_sv.errors import UserError
from llava_sv.files import read_json, sha256_of, write_json

KIND = "llava-sv bench sweep"


class Rows:
    """The file at `path`, or rows in memory alone where it is None. `UserError` for a file that is no sweep's."""

    def __init__(self, path: str | None, anew: bool = False):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.drawn: dict[str, str] = {}
        """Table and pictures made of them: path as seen from the file's folder -> sha256."""
        if path is None or anew or not Path(path).exists():
            return
        try:
            found = read_json(path, KIND)
        except UserError:  # no JSON, so none of ours
            found = None
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise UserError(f"--json {path}: exists and is no sweep's; give another name, or --overwrite")
        self.rows, self.drawn = found["rows"], found.get("drawn", {})

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
        self._write()
        return row

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, {"kind": KIND, "rows": self.rows, "drawn": self.drawn})

    def drew(self, path: str) -> bool:
        """Whether the file at `path` is as this sweep drew it."""
        known = self.drawn.get(self._place(path))
        return known is not None and Path(path).is_file() and sha256_of(path) == known

    def note_drawn(self, paths: list[str]) -> None:
        """Remember what was drawn: it may be drawn again."""
        self.drawn |= {self._place(path): sha256_of(path) for path in paths}
        if paths:
            self._write()

    def _place(self, path: str) -> str:
        return os.path.relpath(os.path.realpath(path), os.path.dirname(os.path.realpath(self.path or ".")))


def key_of(what: str, settings: dict[str, Any], environment: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two measurements the same."""
    machine = {name: value for name, value in environment.items() if name != "date"}
    return what, sorted(settings.items(), key=str), sorted(machine.items(), key=str)
