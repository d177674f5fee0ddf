"""manifest.json: every file of a release with its size and checksum, every tensor with its place and checksum.

`make` writes it as the last file of a folder, for `release`; `read` gives it back checked, for `verify` and `hub`.
No torch is needed for either.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_sv.errors import UserError
from llava_sv.files import read_json, write_text
from llava_sv.release.tensor_bytes import checksums, spans_of

NAME = "manifest.json"
FORMAT = 1
WEIGHTS = ".safetensors"
SELF = "manifest_sha256"
"""Field with the checksum of all the others, so that damage to the manifest itself is told from damage to a file."""

FILE_FIELDS = {"bytes": int, "sha256": str}
TENSOR_FIELDS = {"file": str, "shape": list, "dtype": str, "sha256": str}


def make(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write manifest.json over all other files of `folder`; returns its values.

    facts: what it says beside files and tensors (name, versions, ...): nothing that differs from one making to the
    next. Every byte is read once.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    with tqdm(
        total=sum(p.stat().st_size for p in paths), unit="B", unit_scale=True, desc="checksums", disable=None
    ) as bar:
        for path in paths:
            name = path.relative_to(folder).as_posix()
            spans = spans_of(path) if path.suffix == WEIGHTS else []
            whole, of_tensors = checksums(path, spans, bar.update)
            files[name] = {"bytes": path.stat().st_size, "sha256": whole}
            for span in spans:
                tensors[span.name] = {
                    "file": name,
                    "shape": list(span.shape),
                    "dtype": span.dtype,
                    "sha256": of_tensors[span.name],
                }
    values = {**facts, "format": FORMAT, "files": files, "tensors": tensors}
    values[SELF] = digest_of(values)
    write_text(folder / NAME, json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return values


def digest_of(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest's values but for the field that holds it; the layout of the text does not matter."""
    rest = {key: value for key, value in values.items() if key != SELF}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """manifest.json of `folder`, its fields checked. Raises `UserError`: for a folder that is not there or has none,
    for one that is broken or of another format, and for names that lead out of the folder."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder that it is in")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that llava-sv release wrote, or a download of it")
    path = folder / NAME
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {NAME}, so there is nothing to check it against; give a folder that llava-sv release "
            "wrote, and download it as a whole"
        )
    values = read_json(path, "the download again")
    if not isinstance(values, dict) or not isinstance(values.get("files"), dict):
        raise UserError(f"{path}: is no manifest of a release (it lists no files); download it again")
    if values.get("format") != FORMAT:
        raise UserError(
            f"{path}: is of format {values.get('format')!r}, this version reads {FORMAT}; install a llava_sv that "
            "reads it"
        )
    _check_entries(path, values["files"], FILE_FIELDS, "files")
    tensors = values.setdefault("tensors", {})
    _check_entries(path, tensors, TENSOR_FIELDS, "tensors")
    for name in [*values["files"], *(entry["file"] for entry in tensors.values())]:
        if not is_inside(name):
            raise UserError(f"{path}: names {name!r}, which is not a file of this folder; do not trust this download")
    for name, entry in tensors.items():
        if entry["file"] not in values["files"]:
            raise UserError(f"{path}: {name} is said to be in {entry['file']}, which is none of its files")
    return values


def _check_entries(path: Path, entries: Any, wanted: Mapping[str, type], what: str) -> None:
    if not isinstance(entries, dict):
        raise UserError(f"{path}: {what} is not a table of names; download it again")
    for name, entry in entries.items():
        for field, kind in wanted.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                raise UserError(f"{path}: {what}, {name!r}: has no {field}; download it again")


def is_inside(name: str) -> bool:
    """Whether a name in a manifest is that of a file in its folder: relative, no way up, no drive."""
    parts = name.split("/")
    return (
        bool(name) and not re.search(r"[\\:\0-\x1f]", name) and not any(part in ("", ".", "..", "~") for part in parts)
    )
