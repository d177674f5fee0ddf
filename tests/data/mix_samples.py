"""Small sources and recipes of one's own, for the tests of `data mix` and `data convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from llava_sv import cli
from tests.data.samples import exchange


def record(identity: Any, picture: str | None = "p.png", question: str = "What is it?", answer: str = "A square."):
    """A LLaVA record; picture: relative to its source's folder."""
    if picture is None:
        return {"id": identity, "conversations": exchange(question, answer)}
    return {"id": identity, "image": picture, "conversations": exchange(f"<image>\n{question}", answer)}


def many(name: str, count: int) -> list[dict[str, Any]]:
    """So many records, no two with the same conversation."""
    return [record(number, question=f"{name} {number}?") for number in range(count)]


def source(root: Path, name: str, records: list[Any], pictures: tuple[str, ...] = ("p.png",)) -> dict[str, Any]:
    """Write a source below `root`; its fields for a recipe."""
    folder = root / name
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / "pictures" / picture).write_bytes(b"not opened")
    (folder / "a.json").write_text(json.dumps(records), encoding="utf-8")
    return {
        "name": name,
        "annotations": f"{name}/a.json",
        "images": f"{name}/pictures",
        "converter": "llava_json",
    }


def recipe(path: Path, *sources: dict[str, Any], **fields: Any) -> Path:
    path.write_text(yaml.safe_dump({"name": path.stem, **fields, "sources": list(sources)}), encoding="utf-8")
    return path


def run(path, root, *flags, code=0):
    assert cli.main(["data", "mix", str(path), "--root", str(root), "--workers", "1", *flags]) == code
    return root / "mixtures" / path.stem


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def by_source(folder):
    return {each["source"]: each for each in manifest(folder)["sources"]}


def check_sums(made):
    """What the manifest says of itself."""
    for each in [*made["sources"], made["totals"]]:
        assert each["annotations"] == each["problems"] + each["converted"]
        assert each["converted"] == sum(each[n] for n in ("missing_pictures", "duplicates", "not_sampled", "taken"))
    for name, total in made["totals"].items():
        assert total == sum(each[name] for each in made["sources"])
    assert made["records"] == made["totals"]["taken"]
