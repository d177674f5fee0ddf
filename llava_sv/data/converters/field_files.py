"""Annotations in JSON, JSONL, CSV and TSV files, whose entries are plain objects or rows: `json_fields` and
`table_fields`. Which field is what, the source's options say (`fields`). Called through `get_converter`.

Besides its own fields every entry has `@stem`, `@folder` (of its file) and `@number`; in an object of objects, `@key`.
Options of their own: `entries`, the dotted name of the list (or object of objects) inside a JSON object, "." for the
whole; `delimiter` of a table and, where it has no header line, `columns`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters import read
from llava_sv.data.converters.fields import EntryError, fields_of, items, lookup
from llava_sv.data.converters.items import Inputs, Item
from llava_sv.errors import UserError


def json_fields(inputs: Inputs) -> Iterator[Item]:
    """Entries of a JSON array, of JSONL, or of a part of one JSON object."""
    fields = fields_of(inputs, also=("entries",))
    inside = inputs.option("entries", "")
    for path in inputs.files:
        found = object_entries(path, inside) if inside else numbered(path)
        yield from items(inputs, fields, marked(path, found))


def table_fields(inputs: Inputs) -> Iterator[Item]:
    """Rows of CSV or TSV files."""
    fields = fields_of(inputs, also=("delimiter", "columns"))
    delimiter, columns = inputs.source.options.get("delimiter"), inputs.option("columns", ())
    for path in inputs.files:
        found = bare_table(path, columns, delimiter) if columns else read.table(path, delimiter)
        yield from items(inputs, fields, marked(path, found))


def numbered(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of an array, which often is all in one line, or of JSONL: by line and number."""
    for number, (where, entry) in enumerate(read.entries(path)):
        yield f"{where} entry {number}", entry


def marked(path: Path, found: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The entries, each with what its file's name tells."""
    for number, (where, entry) in enumerate(found):
        if isinstance(entry, dict):
            entry = entry | {"@stem": path.stem, "@folder": path.parent.name, "@number": number}
        yield where, entry


def object_entries(path: Path, inside: str) -> Iterator[tuple[str, Any]]:
    """The entries of the list, or object of objects, at the dotted name `inside` of a JSON file that is one object."""
    whole = read.document(path)
    try:
        value = whole if inside == "." else lookup(whole, inside)
    except EntryError as error:
        raise UserError(f"{path}: {error}; is it the right file?") from error
    if isinstance(value, dict):
        for key, entry in value.items():
            yield f"{path} entry {key!r}", entry | {"@key": key} if isinstance(entry, dict) else entry
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield f"{path} entry {number}", entry
    else:
        raise UserError(f"{path}: {inside!r} is neither a list nor an object; is it the right file?")


def bare_table(path: Path, columns: list[str], delimiter: str | None) -> Iterator[tuple[str, Any]]:
    """Rows of a table without a header line; a row of another width is no entry."""
    delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            for row in reader:
                where = f"{path} line {reader.line_num}"
                yield where, dict(zip(columns, row)) if len(row) == len(columns) else row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (near byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: malformed table: {error}") from error
