"""Small data files, pictures and stand-ins for command-line arguments, for the tests of this folder."""

from __future__ import annotations

import json
import types
from pathlib import Path

from PIL import Image

from llava_sv.data.index import open_index
from llava_sv.mm_utils import clip_image_processor_class


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def with_image(identity, image="a.png", question="<image>\nWhat is it?", answer="A square."):
    return {"id": identity, "image": image, "conversations": exchange(question, answer)}


def text_only(identity, question="How many?", answer="Two."):
    return {"id": identity, "conversations": exchange(question, answer)}


def write_array(path: Path, values: list) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def write_images(folder: Path, **sizes: tuple[int, int]) -> Path:
    """`a=(4, 2)` makes a.png of that size."""
    folder.mkdir(exist_ok=True)
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 30, 30)).save(folder / f"{name}.png")
    return folder


def open_records(folder: Path, values: list):
    return open_index(write_array(folder / "data.json", values), cache_dir=folder / "cache")


def image_processor(side: int = 16):
    return clip_image_processor_class()(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def data_args(image_folder, missing_images="error", **changes):
    values = {"image_aspect_ratio": "pad", "is_multimodal": True, **changes}
    return types.SimpleNamespace(
        image_folder=None if image_folder is None else str(image_folder), missing_images=missing_images, **values
    )
