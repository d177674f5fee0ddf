"""Pictures and files for the sample trees."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image


def picture(name: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture of one colour, which its name decides: two names hardly ever give the same."""
    red, green, blue = hashlib.sha256(name.encode()).digest()[:3]
    return Image.new("RGB", size, (red, green, blue))


def picture_bytes(name: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(name).save(buffer, kind)
    return buffer.getvalue()


def save_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(path.name).save(path)
    return path


def save_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def save_jsonl(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path
