"""SynthText's `gt.mat`: which words were drawn into each picture: `synthtext`. Called through `get_converter`.

The file is MATLAB's, which scipy reads, a package that nothing else here needs. It has `imnames` (1, N) and `txt` (1, N),
each of which is a list of text blocks, lines parted by line breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters import prompts
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.errors import UserError


def synthtext(inputs: Inputs) -> Iterator[Item]:
    """A record for each picture, its blocks in the order in which they were drawn."""
    for path in inputs.files:
        names, blocks = _read(path)
        for number, (name, texts) in enumerate(zip(names, blocks)):
            where = f"{path} entry {number}"
            try:
                image = _text(name)
                lines = [line.strip() for text in texts.ravel().tolist() for line in str(text).splitlines()]
                lines = [line for line in lines if line]
                if not image or not lines:
                    raise ValueError("has no picture" if not image else "has no text")
            except (AttributeError, ValueError, IndexError) as error:
                yield Item(where, problem=str(error))
            else:
                exchange = (prompts.READ, "\n".join(lines))
                yield Item(where, conversation(f"{inputs.source.name}/{image}", [exchange], [inputs.image(image)]))


def _read(path: Path) -> tuple[Any, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path}: is a MATLAB file; install scipy, which reads it") from error
    try:
        values = loadmat(str(path), variable_names=["imnames", "txt"])
    except Exception as error:  # scipy raises whatever the bytes lead it to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as a MATLAB file ({reason})") from error
    for name in ("imnames", "txt"):
        if name not in values:
            raise UserError(f"{path}: has no {name!r}; is it the right file?")
    names, blocks = values["imnames"].ravel(), values["txt"].ravel()
    if len(names) != len(blocks):
        raise UserError(f"{path}: has {len(names)} picture names but {len(blocks)} lists of texts")
    return names, blocks


def _text(value: Any) -> str:
    """The text of a cell: MATLAB's strings come as arrays of one."""
    return str(value.ravel()[0]) if hasattr(value, "ravel") and value.size else str(value) if value is not None else ""
