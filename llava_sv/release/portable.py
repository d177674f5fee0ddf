"""JSON files of a checkpoint made fit for another machine: no local paths, sorted keys.

Values as a run saved them come in; the same without what only holds on the machine of the run goes out. What is taken
out is never read where the release is loaded: its encoder's weights and its tokenizer are inside. Called by `release`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llava_sv.files import write_text

LOCAL_KEYS = (
    *("_name_or_path", "name_or_path", "base_model_name_or_path", "_commit_hash", "is_local", "local_files_only"),
    *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "image_processor_file"),
)
"""Fields, at any depth, that say where something was loaded from."""

AS_THEY_ARE = ("tokenizer.json", "vocab.json", "added_tokens.json", "manifest.json", "model.safetensors.index.json")
"""JSON files whose keys and values are data, not settings."""

ABSOLUTE = re.compile(r"(file:|~/|/[\w.@-]+/|[A-Za-z]:\\)\S*")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FOLDERS = ("checkpoints", "playground", "models", "weights", "pretrained", "data", "outputs", "output", "work", "tmp")
"""First parts of a relative path that are a folder's name rather than an owner's on a hub."""


def portable_name(path: str | None) -> str | None:
    """What stands for a model that was loaded from `path`: its name on the hub where the path tells it, else the last
    part. The same wherever it is called: no folder is looked for."""
    if not path:
        return path
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)(?:/|$)", path)
    if cached:
        return "/".join(cached.groups())
    plain = path.replace("\\", "/").rstrip("/")
    if HUB_NAME.fullmatch(plain) and plain.split("/")[0] not in FOLDERS:
        return plain
    return plain.rsplit("/", 1)[-1] or None


def without_local(values: Any, dropped: list[str], where: str = "") -> Any:
    """`values` without `LOCAL_KEYS`, and without fields that hold an absolute path, whose names go to `dropped`."""
    if isinstance(values, list):
        return [without_local(value, dropped, where) for value in values]
    if not isinstance(values, dict):
        return values
    kept = {}
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if isinstance(value, str) and ABSOLUTE.fullmatch(value):
            if key not in LOCAL_KEYS:
                dropped.append(place)
        elif key not in LOCAL_KEYS:
            kept[key] = without_local(value, dropped, place)
    return kept


def make_portable(folder: Path) -> list[str]:
    """Rewrite the settings among a folder's JSON files; returns a note for every field that was dropped unforeseen."""
    notes = []
    for path in sorted(folder.glob("*.json")):
        if path.name in AS_THEY_ARE:
            continue
        dropped: list[str] = []
        values = without_local(json.loads(path.read_text(encoding="utf-8")), dropped)
        write_sorted(path, values)
        notes += [left_out(path.name, field) for field in dropped]
    return notes


def left_out(file: str, field: str) -> str:
    """The note for a field that was dropped."""
    return f"{file}: {field} held a path of this machine and was left out"


def write_sorted(path: Path, values: Any) -> None:
    """JSON with sorted keys: the same values give the same bytes."""
    write_text(path, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def paths_said(folder: Path, places: list[Path]) -> list[str]:
    """A note for every text file of a folder that names one of this machine's `places`."""
    notes = []
    named = {f"{place}/" for place in places if len(place.parts) > 2}
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".md", ".json", ".jinja", ".py", ".txt", ".yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        notes += [f"{path.name}: names {place}, a path of this machine" for place in sorted(named) if place in text]
    return notes
