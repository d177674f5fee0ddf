"""ImageNet's labels as questions: its class list and training table arrive, records leave, one a picture.

Annotations: LOC_synset_mapping.txt, `n01440764 tench, Tinca tinca` a line, and LOC_train_solution.csv, a table of
ImageId (n01440764_10026) and PredictionString (`n01440764 x y x y ...`). Pictures: CLASS/IMAGEID.JPEG.

Each picture gets one of three tasks, by its name, the same in each run: to name the object, to say whether it is a
given one (as often yes as no), or to choose among four.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters import read
from llava_sv.data.converters.attempt import attempt, text
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.prompts import choices, short
from llava_sv.errors import UserError

CLASSES = ".txt"
NAME = "What is the main object in the image?"
IS_IT = "Is this the main object in the image: {name}?"


def imagenet(inputs: Inputs) -> Iterator[Item]:
    """One record a row of the tables."""
    lists = [path for path in inputs.files if path.suffix == CLASSES]
    if not lists:
        raise UserError(f"source {inputs.source.name!r}: LOC_synset_mapping.txt is not among its annotations; add it")
    names = _classes(lists[0])
    for path in inputs.files:
        if path.suffix != CLASSES:
            for where, row in read.table(path):
                yield attempt(where, _record, inputs, names, row)


def _classes(path: Path) -> dict[str, str]:
    """The first name of each class by its id."""
    names: dict[str, str] = {}
    for number, line in enumerate(read.text(path).splitlines(), 1):
        identity, _, words = line.strip().partition(" ")
        if identity and not words:
            raise UserError(f"{path} line {number}: expected a class and its names, found {line[:80]!r}")
        if identity:
            names[identity] = words.split(",")[0].strip()
    if len(set(names.values())) < 4:
        raise UserError(f"{path}: {len(names)} classes; four are needed for questions with choices")
    return names


def _record(inputs: Inputs, names: dict[str, str], row: dict[str, str]) -> dict[str, Any]:
    picture = text(row, "ImageId")
    wnid = picture.partition("_")[0]
    if wnid not in names:
        raise ValueError(f"image {picture!r} is of no known class")
    name, dice = names[wnid], hashlib.sha256(picture.encode()).digest()
    others = [other for other in dict.fromkeys(names.values()) if other != name]
    task = dice[0] % 3
    if task == 0:
        exchange = (short(NAME), name)
    elif task == 1:
        yes = dice[1] % 2 == 0
        shown = name if yes else others[int.from_bytes(dice[2:6], "big") % len(others)]
        exchange = (short(IS_IT.format(name=shown)), "Yes" if yes else "No")
    else:
        start = int.from_bytes(dice[2:6], "big") % len(others)
        options = [others[(start + step) % len(others)] for step in range(3)]
        options.insert(dice[6] % 4, name)
        exchange = choices(NAME, options, options.index(name))
    return conversation(picture, [exchange], [inputs.image(f"{wnid}/{picture}.JPEG")])
