"""Annotations in JSON, JSONL, CSV, TSV and text files, whose entries are plain objects, rows or texts: `json_fields`,
`table_fields` and `text_fields`. Which field is what, the source's options say (`fields`). Called through
`get_converter`.

Besides its own fields every entry has `@stem` (its file's name without suffix), `@dir` and `@parent` (the file's
folder, and that one's, from the data root on) and `@number`; in an object of objects, `@key`.

Options of their own: `entries`, the key of the list inside a JSON object, `KEY.*` for an object of objects there, "."
for the file's own object of objects; `delimiter` of a table and, where it has no header line, `columns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters import read
from llava_sv.data.converters.fields import fields_of, items
from llava_sv.data.converters.items import Inputs, Item
from llava_sv.errors import UserError


def json_fields(inputs: Inputs) -> Iterator[Item]:
    """Entries of a JSON array, of JSONL, or of a part of one JSON object."""
    fields = fields_of(inputs, also=("entries",))
    inside = inputs.option("entries", "")
    for path in inputs.files:
        found = object_entries(path, inside) if inside else numbered(path)
        yield from items(inputs, fields, marked(inputs, path, found))


def table_fields(inputs: Inputs) -> Iterator[Item]:
    """Rows of CSV or TSV files."""
    fields = fields_of(inputs, also=("delimiter", "columns"))
    delimiter, columns = inputs.source.options.get("delimiter"), inputs.option("columns", ())
    for path in inputs.files:
        yield from items(inputs, fields, marked(inputs, path, read.table(path, delimiter, columns)))


def text_fields(inputs: Inputs) -> Iterator[Item]:
    """Text files, each one entry with one field, `text`."""
    fields = fields_of(inputs)
    for path in inputs.files:
        entry = {"text": read.text(path)}
        yield from items(inputs, fields, marked(inputs, path, iter([(str(path), entry)])))


def numbered(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of an array, which often is all in one line, or of JSONL: by line and number."""
    for number, (where, entry) in enumerate(read.entries(path)):
        yield f"{where} entry {number}", entry


def marked(inputs: Inputs, path: Path, found: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The entries, each with what its file's path tells."""
    folder = Path(inputs.relative(path)).parent
    names = {"@stem": path.stem, "@dir": folder.as_posix(), "@parent": folder.parent.as_posix()}
    for number, (where, entry) in enumerate(found):
        yield where, entry | names | {"@number": number} if isinstance(entry, dict) else entry


def object_entries(path: Path, inside: str) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON file that is one object, in a stream: the items of its list at the key `inside`; with
    `KEY.*` the values of the object there, with "." the file's own values, each with its `@key`."""
    within, values = inside.removesuffix(".*"), inside.endswith(".*")
    known, number = False, 0
    for key, line, value in read.members(path):
        known = known or inside == "." or key == within
        if inside == ".":
            yield keyed(path, key, value)
        elif key == within and not values:
            yield f"{path} line {line} entry {number}", value
            number += 1
        elif key == within and isinstance(value, dict):
            yield from (keyed(path, *member) for member in value.items())
    if not known:
        raise UserError(f"{path}: has no field {within!r}, or nothing in it; is it the right file?")


def keyed(path: Path, key: str, entry: Any) -> tuple[str, Any]:
    """An object's value as an entry."""
    return f"{path} entry {key!r}", entry | {"@key": key} if isinstance(entry, dict) else entry
