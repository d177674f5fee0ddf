"""Captions of pictures: COCO's and TextCaps' files arrive, records leave, one caption each.

coco_captions: {"images": [{id, file_name}], "annotations": [{image_id, id, caption}]}.
textcaps: {"data": [{image_id, caption_str, ...}]}; option captions [first]: the first of a picture's captions, or all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_sv.data.converters.attempt import attempt, text
from llava_sv.data.converters.field_files import object_entries
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.prompts import DESCRIBE


def coco_captions(inputs: Inputs) -> Iterator[Item]:
    """One record a caption."""
    for path in inputs.files:
        found = (image for _, image in object_entries(path, "images") if isinstance(image, dict))
        names = {image["id"]: image.get("file_name") for image in found if isinstance(image.get("id"), (int, str))}
        for where, annotation in object_entries(path, "annotations"):
            yield attempt(where, _coco, inputs, annotation, names)


def _coco(inputs: Inputs, annotation: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    caption = text(annotation, "caption")
    name = names.get(annotation["image_id"])
    if not name:
        raise ValueError(f"image_id {annotation['image_id']} is not among the file's images")
    return conversation(annotation["id"], [(DESCRIBE, caption)], [inputs.image(name)])


def textcaps(inputs: Inputs) -> Iterator[Item]:
    """One record a picture, or one a caption."""
    every = inputs.option("captions", "first") == "all"
    for path in inputs.files:
        seen: set[str] = set()
        for where, entry in object_entries(path, "data"):
            item = attempt(where, _textcaps, inputs, entry)
            name = item.record["image"] if item.record is not None else ""
            if every or not name or name not in seen:
                yield item
            seen.add(name)


def _textcaps(inputs: Inputs, entry: dict[str, Any]) -> dict[str, Any]:
    image = text(entry, "image_id")
    identity = entry.get("caption_id", image)
    return conversation(identity, [(DESCRIBE, text(entry, "caption_str"))], [inputs.image(f"{image}.jpg")])
