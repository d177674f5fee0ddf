"""Which checkpoint a report is of: a fingerprint that survives copying, sharding anew and release, and that anyone can
compute again. Written into reports by `eval.cli` and `eval.timing`; the model card refuses reports of others.

Two parts, because a checkpoint answers otherwise with other weights and, on the same weights, with another token
budget. Of the weights: names, shapes, and rows spread over each tensor, rounded to bfloat16: storing a float32
checkpoint in bfloat16 does not change it (float16 may). Of config.json: what an answer depends on, without paths.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava_sv.errors import UserError, in_words
from llava_sv.files import read_json
from llava_sv.model.config import SkipVisionConfig

ROWS = 8
"""Of each tensor, spread evenly; a tensor of no more than `WHOLE` values is taken whole."""
WHOLE = 4096

SETTINGS = (
    "model_type",
    "mm_family",
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_vision_feature_levels",
    "mm_vision_image_size",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "hd_max_tiles",
    "hd_fixed_grid",
    "cos_windows",
    "cos_queries",
    "conv_template",
)
"""Fields of config.json that decide how an image is seen and a question is put, beside `skip_vision`."""


def identity(folder: str | Path, conv_template: str | None = None) -> dict[str, str] | None:
    """`{"weights": ..., "settings": ...}`, both SHA-256 in hexadecimal; None for what is no folder with safetensors.

    conv_template: in place of config.json's. A folder of adapters is known by the adapters. Raises `UserError` for
    files that cannot be read.
    """
    folder = Path(folder)
    files = weight_files(folder) if folder.is_dir() else []
    if not files or not (folder / "config.json").is_file():
        return None
    return {"weights": of_weights(files), "settings": of_settings(folder / "config.json", conv_template)}


def weight_files(folder: Path) -> list[Path]:
    """Safetensors of a whole checkpoint, or else of adapters, or else of a projector, in order of their names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        mapping = read_json(index, "the download again").get("weight_map", {})
        return [folder / name for name in sorted(set(mapping.values()))]
    adapters = [folder / name for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors")]
    lone = folder / "mm_projector.safetensors"
    return [path for path in adapters if path.is_file()] or ([lone] if lone.is_file() else [])


def of_weights(files: list[Path]) -> str:
    """The weights' part; neither the files' names nor the order of tensors in them count."""
    found: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    found[name] = _of_tensor(file, name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"weights {path}: cannot be read ({in_words(error)})") from error
    return _digest(found)


def _of_tensor(file: Any, name: str) -> str:
    part = file.get_slice(name)
    shape = list(part.get_shape())
    count = 1
    for size in shape:
        count *= size
    if count <= WHOLE or not shape:
        values = [file.get_tensor(name)]
    else:
        places = sorted({i * (shape[0] - 1) // (ROWS - 1) for i in range(ROWS)})
        values = [part[place : place + 1] for place in places]
    digest = hashlib.sha256(json.dumps(shape).encode())
    for value in values:
        as_stored = value.to(torch.bfloat16).view(torch.int16) if value.is_floating_point() else value
        digest.update(as_stored.contiguous().numpy().tobytes())
    return digest.hexdigest()


def of_settings(path: Path, conv_template: str | None = None) -> str:
    """The part of config.json; a default that is written out counts as one that is not."""
    values = read_json(path, "the download again")
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; take the checkpoint's own config.json")
    chosen = {name: values[name] for name in SETTINGS if values.get(name) is not None}
    if conv_template:
        chosen["conv_template"] = conv_template
    if values.get("skip_vision") is not None:
        try:
            chosen["skip_vision"] = SkipVisionConfig.from_dict(values["skip_vision"]).to_dict()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return _digest(chosen)


def of_questions(questions: list[Any]) -> str:
    """The questions that were asked: SHA-256 of their ids, texts and answers, in order."""
    return _digest([[question.id, question.text, question.answer] for question in questions])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
