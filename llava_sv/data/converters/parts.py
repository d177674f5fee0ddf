"""A source whose annotation files are of several formats: `parts`. Called through `get_converter`.

parts: a list of {match, converter, options}; a file belongs to the first part whose `match`, a glob, its name fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from llava_sv.data.converters.items import Inputs, Item
from llava_sv.errors import UserError


def parts(inputs: Inputs) -> Iterator[Item]:
    """The records of each part, in the order of the parts."""
    from llava_sv.data.converters import get_converter

    given = inputs.option("parts")
    for part in given:
        if not isinstance(part, dict) or not part.keys() >= {"match", "converter"}:
            raise UserError(f"source {inputs.source.name!r}: a part needs 'match' and 'converter', found {part}")
    claimed: list[list[Path]] = [[] for _ in given]
    for path in inputs.files:
        for part, files in zip(given, claimed):
            if fnmatchcase(path.name, part["match"]):
                files.append(path)
                break
        else:
            raise UserError(f"{path}: no part of source {inputs.source.name!r} is for a file of this name")
    for part, files in zip(given, claimed):
        if files:
            source = replace(inputs.source, converter=part["converter"], options=part.get("options") or {})
            yield from get_converter(part["converter"])(Inputs(source, inputs.root, tuple(files)))
