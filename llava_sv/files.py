"""Atomic writes: a reader sees the old file or the whole new one; JSON read back; checksums. Called by every room that
leaves a file behind."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_sv.errors import FULL, UserError, not_written


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); on leaving without an error it takes `path`'s place.

    What the system refuses (`OSError`) names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (name, temporary) or (error.errno in FULL and error.filename is None):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_can_write(flag: str, path: Path) -> None:
    """Raise `UserError` now for what `flag` names, if a file cannot be written there later."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        there = next((one for one in path.parents if one.exists()), path.parent)
        raise UserError(f"{flag} {path}: {there} is a file, not a folder; name another folder") from error
    except OSError as error:
        raise not_written(f"{flag} {path}:", error, "name another file") from error


def keep_existing(path: str | None, overwrite: bool, flag: str = "--json") -> None:
    """Raise `UserError` before any work if what `flag` names exists already and was not to be replaced."""
    if path is not None and not overwrite and Path(path).exists():
        raise UserError(f"{flag} {path}: exists; give another name, or --overwrite")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, made_by: str) -> Any:
    """The value in `path`; `UserError` names a file that is absent or broken, and `made_by`, the command to run."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no such file: {path}; run {made_by}, which makes it") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (near byte {error.start}); run {made_by}, which makes it"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error


def sha256_of(path: str | Path) -> str:
    """A file's checksum, hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
