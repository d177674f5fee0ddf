"""Which layout a checkpoint's folder is in, by its config.json; never by its name. Called by converting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sv.errors import UserError
from llava_sv.files import read_json
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE
from llava_sv.model.llava_layout import WEIGHTS, is_foreign

HF_MODEL_TYPES = ("llava", "llava_next")
"""`model_type` of transformers' own LLaVA and LLaVA-NeXT."""

ADAPTERS = "adapter_config.json"

NOT_WHOLE: dict[str, str] = {
    ADAPTERS: "holds adapters alone; make it whole first: llava-sv convert --merge-lora {} --output DIR",
    "mm_projector.bin": "holds a projector alone; train on it, or merge it with its language model first",
    "mm_projector.safetensors": "holds a projector alone; train on it, or merge it with its language model first",
}


def read_values(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder. `UserError` where the folder or the file is absent or broken."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a checkpoint's folder")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; give the folder of a checkpoint")
    values = read_json(path, "the download or the training again")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not a config's fields; get the file again")
    return values


def layout_of(folder: Path) -> str:
    """One of `plan.LAYOUTS`. `UserError` for a folder in none of them, naming the field that says so."""
    values = read_values(folder)
    model_type = values.get("model_type")
    if isinstance(values.get("text_config"), dict):
        if model_type in HF_MODEL_TYPES:
            return "hf"
        raise UserError(
            f"{folder / 'config.json'}: model_type {model_type!r} is not converted; of transformers' own models "
            f"{' and '.join(HF_MODEL_TYPES)} are"
        )
    if model_type in BY_MODEL_TYPE and "mm_vision_tower" in values:
        return "llava" if is_foreign(values) else "sv"
    raise UserError(
        f"{folder / 'config.json'}: model_type {model_type!r} is in no layout that is known: this project's and "
        f"LLaVA's ({', '.join(BY_MODEL_TYPE)}; with mm_vision_tower), transformers' ({', '.join(HF_MODEL_TYPES)}; with "
        "text_config)"
    )


def check_whole(folder: Path) -> None:
    """`UserError` for a folder without weights of its own that holds a part, naming how to make it whole; and for one
    with adapters beside a whole model."""
    if any((folder / name).is_file() for name in WEIGHTS):
        if (folder / ADAPTERS).is_file():
            raise UserError(f"{folder}: holds adapters ({ADAPTERS}) beside a whole model; move one of them elsewhere")
        return
    for name, why in NOT_WHOLE.items():
        if (folder / name).is_file():
            raise UserError(f"{folder}: {why.format(folder)}")
