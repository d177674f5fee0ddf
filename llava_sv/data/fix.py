"""The clean copy that `llava-sv data check --fix` writes, and its log. `data.check` hands over every record in order.

A record with nothing wrong is written as it stands, byte for byte; the others as `data.mend` leaves them, or not at
all. Both files are streamed, and take their places only when everything is written.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from llava_sv.data.json_recovery import Found
from llava_sv.data.seen import Seen
from llava_sv.errors import UserError
from llava_sv.files import replacing

SUFFIXES = (".json", ".jsonl")


class CleanCopy:
    """A context manager: leaving it without an error puts `path` (.json: an array; .jsonl: a record a line) and
    `log_path` in place. Raises `UserError` at once for another suffix, or for `path` being `source` itself."""

    def __init__(self, path: Path, source: Path) -> None:
        if path.suffix not in SUFFIXES:
            raise UserError(f"--fix {path}: name a file that ends in .json or .jsonl")
        if path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"--fix {path}: is the file that is checked, which stays as it is; name another")
        if path.is_dir():
            raise UserError(f"--fix {path}: is a folder; name a file in it")
        self.path, self.log_path = path, Path(f"{path}.fixes.jsonl")
        self.written, self.done = 0, Counter[str]()
        self._ids, self._records = Seen(), Seen()

    def __enter__(self) -> CleanCopy:
        self._stack = ExitStack()
        self._out, self._log = (self._open(path) for path in (self.path, self.log_path))
        self._begin = "[" if self.path.suffix == ".json" else ""
        return self

    def _open(self, path: Path) -> TextIO:
        temporary = self._stack.enter_context(replacing(path))
        return self._stack.enter_context(temporary.open("w", encoding="utf-8", newline="\n"))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and not self.written:
            kind, error = UserError, UserError(f"--fix {self.path}: no record is left that training could read")
            self._stack.__exit__(kind, error, trace)
            raise error
        if kind is None:
            try:
                self._out.write("\n]\n" if self.path.suffix == ".json" else "")
                for file in (self._out, self._log):
                    file.flush()
            except OSError as full:  # told before one of the two is in place
                self._stack.__exit__(type(full), full, full.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)

    def log(self, line: int, record: str, kind: str, done: str) -> None:
        """Put one change into the log."""
        self.done["left out" if done.startswith("left out") else "changed"] += 1
        entry = {"line": line, "record": record, "kind": kind, "done": done}
        self._log.write(json.dumps(entry) + "\n")

    def add(self, found: Found, value: dict[str, Any], changed: bool, content: str) -> None:
        """Write one record, unless its images and conversation (`content`) were written before; ids are made unique.

        value: as it shall be; changed: whether it differs from `found`.
        """
        name = "" if value.get("id") is None else str(value["id"])
        if self._records.add(content):
            self.log(found.line, name, "duplicate_record", "left out: the same images and conversation as before")
            return
        if name:
            unique, number = name, 1
            while self._ids.add(unique):
                number = number + 1 if number < 9 else max(number + 1, self.written)
                unique = f"{name}-{number}"
            if unique != name:
                value, changed = {**value, "id": unique}, True
                self.log(found.line, name, "duplicate_id", f"renamed {unique!r}")
        text = _written(value) if changed or not found.text else found.text
        if self.path.suffix == ".jsonl" and "\n" in text:
            text = _written(value)
        self._out.write(f"{self._begin}{text}" if self.path.suffix == ".json" else f"{text}\n")
        self._begin = ",\n"
        self.written += 1


def _written(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is not looked at
        return json.dumps(value)
    return text
