"""Pairs of picture and caption in WebDataset tars, as img2dataset writes them: tars arrive, records leave, whose
pictures are named by their place in the tar. Nothing is extracted.

    00000.tar: 000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, ...

Options: caption [txt]: `txt`, the member of that suffix, or `json:FIELD`, a field of the .json member; question
[Provide a one-sentence caption for the provided image.].
A tar with a link, a device, or a member whose name is absolute or climbs is refused whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.containers import Tar
from llava_sv.data.converters.attempt import attempt
from llava_sv.data.converters.clock import timed_stream
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.prompts import DESCRIBE
from llava_sv.data.image_refs import tar_ref
from llava_sv.data.webdataset import PICTURES, Sample, tar_samples
from llava_sv.errors import UserError, in_words

LONGEST_TEXT = 1 << 20


def webdataset(inputs: Inputs) -> Iterator[Item]:
    """One record a key, which is a member's path up to the first dot of its name."""
    for path in inputs.files:
        for sample, text in _samples(path, inputs.option("caption", "txt").partition(":")[0]):
            yield attempt(f"{path} member {sample.key}", _record, inputs, path, sample, text)


def _record(inputs: Inputs, path: Path, sample: Sample, text: bytes | None) -> dict[str, Any]:
    picture = next((sample.parts[suffix] for suffix in PICTURES if suffix in sample.parts), None)
    if picture is None:
        raise ValueError(f"has no picture; it has {', '.join(sorted(sample.parts))}")
    caption = _caption(sample, text, inputs.option("caption", "txt"))
    if picture.size == 0:
        raise ValueError("its picture has no bytes")
    image = tar_ref(inputs.relative(path), picture.name, picture.offset, picture.size)
    question = inputs.option("question", DESCRIBE)
    return conversation(f"{path.stem}/{sample.key}", [(question, caption)], [image])


def _caption(sample: Sample, text: bytes | None, wanted: str) -> str:
    suffix, _, field = wanted.partition(":")
    if suffix not in sample.parts:
        raise ValueError(f"has no .{suffix}")
    if text is None:
        raise ValueError(f"its .{suffix} is longer than {LONGEST_TEXT} bytes")
    found = text.decode("utf-8").strip()
    if field:
        value = json.loads(found).get(field)
        found = value.strip() if isinstance(value, str) else ""
    if not found:
        raise ValueError("its caption is empty")
    return found


@timed_stream
def _samples(path: Path, suffix: str) -> Iterator[tuple[Sample, bytes | None]]:
    """Each sample, and the bytes of its member of that suffix; None: it has none, or one that is too long."""
    try:
        tar = Tar(path)
        for sample in tar_samples(path):
            member = sample.parts.get(suffix)
            if member is None or member.size > LONGEST_TEXT:
                yield sample, None
            else:
                yield sample, tar.read(member.offset, member.size)
    except (EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({in_words(error)})") from error
