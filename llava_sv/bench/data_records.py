"""Synthetic records much like LLaVA-665K's, and pictures. Called by `bench.data` and `bench.data_measure`.

A seed and a number arrive, a JSON array (or JSONL) leaves, written in a stream: 6 % text alone, 1 to 24 exchanges,
answers of one word or of a paragraph, images in that mixture's five folders.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava_sv.files import replacing

TEXT_ONLY = 0.06
FOLDERS = {"coco/train2017": 0.6, "gqa/images": 0.12, "ocr_vqa/images": 0.13, "vg/VG_100K": 0.11, "textvqa": 0.04}
"""Image folder -> share of the records with an image."""

ASK_SHORT = "Answer the question using a single word or phrase."
_TEXT = (
    "the a of in on and is are with person man woman street table red blue white black small large standing sitting "
    "holding wearing near next behind front image picture shows appears several people car bus dog cat window door"
)
_WORDS = tuple(_TEXT.split(" "))
BLOCK = 2000
"""Records whose text is drawn once and used again with other numbers: drawing nine million anew takes hours."""


def write_records(path: Path, count: int, seed: int = 0, source: str | None = None, quiet: bool = False) -> None:
    """A JSON array of `count` records, or JSONL where `path` ends with it; `source` names their source.

    The file is whole or absent.
    """
    lines = path.suffix == ".jsonl"
    heads = _block(random.Random(seed), source)
    between = "\n" if lines else ",\n"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        bar = tqdm(total=count, desc=f"writing {path.name}", unit="record", unit_scale=True, disable=quiet)
        file.write("" if lines else "[")
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            texts = [text.replace("#NUMBER#", f"{start + place:012d}") for place, text in enumerate(heads[:size])]
            file.write((between if start else "") + between.join(texts))
            bar.update(size)
        file.write("\n" if lines else "]")
        bar.close()


def _block(rng: random.Random, source: str | None) -> list[str]:
    return [json.dumps(_record(rng, source), ensure_ascii=False) for _ in range(BLOCK)]


def _record(rng: random.Random, source: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {"id": "#NUMBER#"}
    if source is not None:
        record["source"] = source
    has_image = rng.random() >= TEXT_ONLY
    if has_image:
        folder = rng.choices(list(FOLDERS), list(FOLDERS.values()))[0]
        record["image"] = f"{folder}/#NUMBER#.jpg"
    short = has_image and rng.random() < 0.55
    exchanges = min(24, 1 + int(rng.expovariate(1 / (7 if short else 2.2))))
    turns: list[dict[str, str]] = []
    for number in range(exchanges):
        question = _sentence(rng, 6, 12)[:-1] + "?" + (f"\n{ASK_SHORT}" if short and not number else "")
        told = [_sentence(rng, 8, 18) for _ in range(1 if short else rng.randint(1, 4))]
        answer = rng.choice(_WORDS).title() if short else " ".join(told)
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if has_image:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    record["conversations"] = turns
    return record


def _sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(least, most))).capitalize() + "."


def write_pictures(folder: Path, count: int, seed: int = 0) -> None:
    """JPEG files 000000000000.jpg and on, of 640 x 480 pixels or upright, coarse noise, as large as a photo's."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        size = (480, 640) if number % 4 == 0 else (640, 480)
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:012d}.jpg", quality=90)
