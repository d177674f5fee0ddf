"""Visual Genome's pictures and what is written about their regions: its files arrive, records leave.

vg_regions: image_data.json and region_descriptions.json, one record a region.
crepe: image_data.json and CREPE's productivity tables (image_id, caption, hard_negs, x, y, width, height), one choice
between captions each. Option negatives [3]: how many wrong ones.

Boxes are [left, top, right, bottom] as shares of the picture's width and height, two digits after the point. In which
of its two folders a picture lies stands in image_data.json's `url` alone.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_sv.data.converters.attempt import attempt, text
from llava_sv.data.converters.field_files import numbered
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.prompts import choices
from llava_sv.data.converters.read import entries, table
from llava_sv.errors import UserError

IMAGE_DATA = "image_data.json"
DESCRIBE_REGION = "Provide a short description for this region: {box}."
WHICH_CAPTION = "Which caption describes the region {box} of the image?"
WHICH_CAPTION_OF_ALL = "Which caption describes the image?"


class Picture(NamedTuple):
    """name: folder and file, such as VG_100K_2/1.jpg; width and height in pixels."""

    name: str
    width: int
    height: int


def vg_regions(inputs: Inputs) -> Iterator[Item]:
    """One record a region; one that repeats a phrase of its picture in the same place is left out."""
    pictures = _pictures(inputs)
    for path in _others(inputs):
        for where, entry in numbered(path):
            if not isinstance(entry, dict) or not isinstance(entry.get("regions"), list):
                yield Item(where, problem="has no list 'regions'")
                continue
            seen = set()
            for region in entry["regions"]:
                item = attempt(where, _region, inputs, pictures, entry, region)
                said = str(item.record["conversations"]) if item.record is not None else ""
                if not said or said not in seen:
                    yield item
                seen.add(said)


def _region(inputs: Inputs, pictures: dict[int, Picture], entry: Any, region: Any) -> dict[str, Any]:
    phrase = text(region, "phrase")
    picture = _picture(pictures, region.get("image_id", entry.get("id")))
    question = DESCRIBE_REGION.format(box=_box(region, picture))
    return conversation(region["region_id"], [(question, phrase)], [inputs.image(picture.name)])


def crepe(inputs: Inputs) -> Iterator[Item]:
    """One record a row."""
    pictures = _pictures(inputs)
    for path in _others(inputs):
        for number, (where, row) in enumerate(table(path)):
            yield attempt(where, _choice, inputs, pictures, row, f"{path.stem}-{number}")


def _choice(inputs: Inputs, pictures: dict[int, Picture], row: dict[str, str], identity: str) -> dict[str, Any]:
    caption = text(row, "caption")
    picture = _picture(pictures, text(row, "image_id"))
    try:
        wrong = ast.literal_eval(row["hard_negs"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"field 'hard_negs' is no list of captions ({error.__class__.__name__})") from error
    wrong = [one for one in dict.fromkeys(str(one).strip() for one in wrong) if one not in ("", caption)]
    if not wrong:
        raise ValueError("field 'hard_negs' is empty")
    wrong = sorted(wrong, key=lambda one: _hash(identity, one))[: inputs.option("negatives", 3)]
    options = sorted([caption, *wrong], key=lambda one: _hash(one, identity))
    has_box = all(row.get(key) for key in ("x", "y", "width", "height"))
    question = WHICH_CAPTION.format(box=_box(row, picture)) if has_box else WHICH_CAPTION_OF_ALL
    question, letter = choices(question, options, options.index(caption))
    return conversation(identity, [(question, letter)], [inputs.image(picture.name)])


def _pictures(inputs: Inputs) -> dict[int, Picture]:
    """Every picture by id, from image_data.json, which must be among the annotations."""
    path = next((path for path in inputs.files if path.name == IMAGE_DATA), None)
    if path is None:
        raise UserError(f"source {inputs.source.name!r}: {IMAGE_DATA} is not among its annotations; add it")
    pictures: dict[int, Picture] = {}
    for where, entry in entries(path):
        try:
            name = "/".join(entry["url"].split("/")[-2:])
            pictures[int(entry.get("image_id", entry.get("id")))] = Picture(name, entry["width"], entry["height"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{where}: expected image_id, url, width and height, as published") from error
    return pictures


def _others(inputs: Inputs) -> list[Path]:
    return [path for path in inputs.files if path.name != IMAGE_DATA]


def _picture(pictures: dict[int, Picture], identity: Any) -> Picture:
    found = pictures.get(int(identity)) if str(identity).isdecimal() else None
    if found is None:
        raise ValueError(f"image {identity} is not in {IMAGE_DATA}")
    return found


def _box(region: dict[str, Any], picture: Picture) -> str:
    left, top, width, height = (float(region[key]) for key in ("x", "y", "width", "height"))
    if width <= 0 or height <= 0:
        raise ValueError(f"its region is {width:g} by {height:g} pixels")
    across, down = (left, left + width), (top, top + height)
    corners = [
        edge / side for pair in zip(across, down, strict=True) for edge, side in zip(pair, picture[1:], strict=True)
    ]
    return "[" + ", ".join(f"{min(1.0, max(0.0, corner)):.2f}" for corner in corners) + "]"


def _hash(*parts: str) -> bytes:
    """An order that looks like chance and is the same in each run."""
    return hashlib.sha256("\0".join(parts).encode()).digest()
