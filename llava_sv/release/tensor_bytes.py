"""Safetensors files as bytes: which tensor lies where, and checksums of the file and of each tensor in one reading.

A path comes in, `Span`s and hexadecimal SHA-256 go out; no torch, and memory of a few MB whatever the file's size.
Called by `manifest` and `verify`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PIECE = 4 << 20
"""Bytes read at a time."""

MOST_HEADER = 100_000_000
"""Bytes of a header beyond which the format's own library refuses a file."""

BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32}
BITS |= {"I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
"""The format's names of types -> bits of a value."""


class BadHeader(ValueError):
    """The header of a file is not one of the format; says what is wrong with it."""


@dataclass(frozen=True)
class Span:
    """A tensor in a file: bytes `start` to `end`, counted from the file's beginning."""

    name: str
    dtype: str
    """As the format names it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    end: int


def spans_of(path: Path) -> list[Span]:
    """The tensors of a file in the order they lie in, one after another without gaps, as its header says.

    The file may be shorter than its header says (a download that was cut off). Raises `BadHeader`, `OSError`.
    """
    with open(path, "rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise BadHeader(f"the file has {len(first)} bytes")
        (length,) = struct.unpack("<Q", first)
        if length > MOST_HEADER:
            raise BadHeader(f"its first 8 bytes announce a header of {length} bytes")
        text = file.read(length)
    if len(text) < length:
        raise BadHeader(f"the file ends inside its header of {length} bytes")
    try:
        values = json.loads(text)
        spans = [
            Span(name, it["dtype"], tuple(map(int, it["shape"])), *(8 + length + int(n) for n in it["data_offsets"]))
            for name, it in values.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadHeader(f"it is not a list of tensors ({type(error).__name__})") from error
    spans.sort(key=lambda span: (span.start, span.end, span.name))
    _check_layout(spans, 8 + length)
    return spans


def _check_layout(spans: list[Span], position: int) -> None:
    """`BadHeader` for spans that leave gaps, overlap, or are not as long as type and shape say."""
    for span in spans:
        bits = BITS.get(span.dtype)
        if bits is None:
            raise BadHeader(f"{span.name} is of unknown type {span.dtype!r}")
        for size in span.shape:
            bits *= size
        if span.start != position or (span.end - span.start) * 8 != bits:
            raise BadHeader(f"{span.name} does not lie where it should, or is not as long as its shape says")
        position = span.end


def sha256_of_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """A file's SHA-256; `progress` hears of each piece's bytes."""
    return checksums(path, [], progress)[0]


def checksums(
    path: Path, spans: list[Span], progress: Callable[[int], object] | None = None
) -> tuple[str, dict[str, str]]:
    """(SHA-256 of the file, name -> SHA-256 of each tensor's bytes) in one reading.

    spans: the file's tensors, as `spans_of` gives them. A tensor that the file's end cuts off is left out.
    """
    whole = hashlib.sha256()
    of_tensors: dict[str, str] = {}
    with open(path, "rb") as file:

        def read(count: int | None, *digests: hashlib._Hash) -> int:
            done = 0
            while count is None or done < count:
                piece = file.read(PIECE if count is None else min(PIECE, count - done))
                if not piece:
                    break
                for digest in digests:
                    digest.update(piece)
                done += len(piece)
                if progress is not None:
                    progress(len(piece))
            return done

        if spans:
            read(spans[0].start, whole)
        for span in spans:
            tensor = hashlib.sha256()
            if read(span.end - span.start, whole, tensor) == span.end - span.start:
                of_tensors[span.name] = tensor.hexdigest()
        read(None, whole)
    return whole.hexdigest(), of_tensors
