"""Pairs of picture and caption in WebDataset tars, as img2dataset writes them: tars arrive, records leave, whose
pictures are named by their place in the tar. Nothing is extracted.

    00000.tar: 000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, ...

Options: caption [txt]: `txt`, the member of that suffix, or `json:FIELD`, a field of the .json member; question
[Provide a one-sentence caption for the provided image.].
A tar with a link, a device, or a member whose name is absolute or climbs is refused whole.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters.attempt import attempt
from llava_sv.data.converters.clock import timed_stream
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.prompts import DESCRIBE
from llava_sv.data.image_refs import parse_ref, tar_ref
from llava_sv.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
LONGEST_TEXT = 1 << 20


def webdataset(inputs: Inputs) -> Iterator[Item]:
    """One record a key, which is a member's path up to the first dot of its name."""
    for path in inputs.files:
        for key, parts in _samples(path, inputs.option("caption", "txt").partition(":")[0]):
            yield attempt(f"{path} member {key}", _record, inputs, path, key, parts)


def _record(inputs: Inputs, path: Path, key: str, parts: dict[str, Any]) -> dict[str, Any]:
    picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
    if picture is None:
        raise ValueError(f"has no picture; it has {', '.join(sorted(parts))}")
    caption = _caption(parts, inputs.option("caption", "txt"))
    if picture.size == 0:
        raise ValueError("its picture has no bytes")
    image = tar_ref(inputs.relative(path), picture.name, picture.offset_data, picture.size)
    question = inputs.option("question", DESCRIBE)
    return conversation(f"{path.stem}/{key}", [(question, caption)], [image])


def _caption(parts: dict[str, Any], wanted: str) -> str:
    suffix, _, field = wanted.partition(":")
    if suffix not in parts:
        raise ValueError(f"has no .{suffix}")
    given = parts[suffix]
    if given is None:
        raise ValueError(f"its .{suffix} is longer than {LONGEST_TEXT} bytes")
    found = given.decode("utf-8").strip() if isinstance(given, bytes) else ""
    if field:
        value = json.loads(found).get(field)
        found = value.strip() if isinstance(value, str) else ""
    if not found:
        raise ValueError("its caption is empty")
    return found


@timed_stream
def _samples(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, {suffix: member, or of the one named `text` its bytes, None where too long}) of each run of members."""
    current, end = "", 0
    parts: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                _check(path, member)
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}{slash}{stem}"
                if key != current:
                    if parts:
                        yield current, parts
                    current, parts = key, {}
                parts[suffix.lower()] = _read(tar, member) if suffix.lower() == text else member
                tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every one
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an uncompressed tar ({str(error).splitlines()[0]})") from error
    if parts:
        yield current, parts
    _check_end(path, end)


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header for the end: after the last member, `end` bytes on, there must be a zero block."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"{path}: is damaged or cut off at byte {end}; fetch it again")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if member.size > LONGEST_TEXT:
        return None
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _check(path: Path, member: tarfile.TarInfo) -> None:
    if not member.isfile() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "no plain file"
        raise UserError(f"{path}: member {member.name!r} is {kind}; such a tar is refused")
    try:
        parse_ref(tar_ref("x.tar", member.name, 0, 1))
    except UserError as error:
        raise UserError(f"{path}: member {member.name!r} leaves the tar's folder; such a tar is refused") from error
