"""LLaVA's own checkpoints (`liuhaotian/llava-v1.5-*`, `llava-v1.6-*`): their config.json in this project's fields.

A checkpoint of theirs says nothing of `mm_family`, and describes its encoder by name alone (`mm_vision_tower`), whether
its weights are in the checkpoint (v1.6, trained ones) or not (v1.5). What its config.json asks for and cannot be done
here is a `UserError` that names the field. Called by `loading` and by `release`.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open

from llava_sv.errors import UserError
from llava_sv.files import read_json
from llava_sv.model.checkpoint_io import UNREADABLE, out_of_reach
from llava_sv.tiling import ANYRES

NEWLINE, OUR_NEWLINE = "model.image_newline", "model.mm_projector.image_newline"
"""The row end of `anyres`, as LLaVA calls it and as this project does."""

KEY_MAPPING = {rf"^{re.escape(NEWLINE)}$": OUR_NEWLINE}
"""What transformers is to rename while it loads."""

TOWER = "model.vision_tower."
"""Before all names of an encoder's weights, in both layouts."""

YI_VOCABULARY, LLAMA_3_VOCABULARY = 64000, 128000
"""Tokens of LLaVA-1.6-34B's language model; at least so many of LLaMA 3's."""

UNPAD = "spatial_unpad"

OURS = ("mm_family", "skip_vision", "vision_config")
"""Fields of this project's config.json, any of which LLaVA's own has not."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that hold or list a whole checkpoint's weights, in the order in which transformers looks for them."""

SWITCHES = {
    "mm_use_im_start_end": "marks before and after an image (LLaVA 1.0)",
    "mm_use_im_patch_token": "a patch token in the vocabulary (LLaVA 1.0)",
    "s2": "an encoder run at several scales (S2)",
    "mm_resampler_type": "a resampler after the encoder",
    "use_pos_skipping": "positions that skip",
}
"""Fields of LLaVA and its forks that ask, where set, for what is not in this model; and what that is."""


def is_foreign(values: dict[str, Any]) -> bool:
    """Whether a LLaVA's config.json is not this project's, which has fields that LLaVA's has not."""
    return "mm_vision_tower" in values and not any(name in values for name in OURS)


def as_ours(values: dict[str, Any]) -> dict[str, Any]:
    """A LLaVA's config.json in this project's fields; what it has besides stays as it is. `UserError` for a field that
    asks for something else."""
    for name, what in SWITCHES.items():
        if values.get(name):
            raise UserError(
                f"{name} {values[name]!r}: {what} is not supported; take a checkpoint without (LLaVA-1.5 and 1.6 are)"
            )
    own = {name: value for name, value in values.items() if name != "auto_map"}
    own["mm_projector_type"] = values.get("mm_projector_type") or "linear"  # LLaVA's default, of its first version
    own["image_aspect_ratio"] = values.get("image_aspect_ratio") or "square"
    own["mm_family"] = "llava_hd" if _is_anyres(values) else "llava"
    own["image_grid_pinpoints"] = _pinpoints(values) if own["mm_family"] == "llava_hd" else None
    own["conv_template"] = values.get("conv_template") or likely_template(values)
    return own


def likely_template(values: dict[str, Any]) -> str:
    """The conversation template of LLaVA's own checkpoints, which their config.json does not name: by language model
    (Mistral; Yi and LLaMA 3 by their vocabularies; LLaMA 2's chat model; Vicuna)."""
    if values.get("model_type") == "llava_mistral":
        return "mistral_instruct"
    if values.get("model_type") == "llava_qwen" or values.get("vocab_size") == YI_VOCABULARY:
        return "chatml"
    if (values.get("vocab_size") or 0) >= LLAMA_3_VOCABULARY:
        return "llama_3"
    return "llama_2" if "llama-2" in str(values.get("_name_or_path")).lower() else "v1"


def _is_anyres(values: dict[str, Any]) -> bool:
    """Whether images are cut into tiles as LLaVA-1.6 does it; `UserError` for another way of putting them together."""
    aspect, merge = str(values.get("image_aspect_ratio")), values.get("mm_patch_merge_type") or "flat"
    if aspect.startswith(ANYRES) and aspect != ANYRES:
        raise UserError(f"image_aspect_ratio {aspect!r}: only 'anyres' is read, as LLaVA-1.6 has it")
    if aspect == ANYRES and merge != UNPAD:
        raise UserError(
            f"mm_patch_merge_type {merge!r} with image_aspect_ratio 'anyres' is not supported; known: {UNPAD!r}"
        )
    if aspect != ANYRES and merge not in ("flat", "spatial"):
        raise UserError(
            f"mm_patch_merge_type {merge!r} with image_aspect_ratio {aspect!r} is not supported; known: 'flat', "
            f"or {UNPAD!r} with 'anyres'"
        )
    return aspect == ANYRES


def _pinpoints(values: dict[str, Any]) -> list[list[int]] | None:
    """`image_grid_pinpoints`, which LLaVA's training may have written as text. LLaVA needs it; without, its five."""
    given = values.get("image_grid_pinpoints")
    if not isinstance(given, str):
        return given
    try:
        return [[int(width), int(height)] for width, height in ast.literal_eval(given)]
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(
            f"image_grid_pinpoints {given!r}: expected a list of (width, height), such as [[336, 672], [672, 336]]"
        ) from error


def refuse_delta(path: str, values: dict[str, Any]) -> None:
    """`UserError` for LLaVA's first checkpoints, which hold only the difference to a LLaMA; they say so by name."""
    for name in (os.path.basename(path.rstrip("/")), os.path.basename(str(values.get("_name_or_path") or ""))):
        if re.search(r"(?i)llava.*[-_]delta[-_]v\d", name):
            raise UserError(
                f"checkpoint {path}: holds delta weights ({name}), the difference to a LLaMA, which are not read; add "
                "them to their base with LLaVA's own apply_delta first, or take a later checkpoint"
            )


def weight_names(path: str) -> list[str]:
    """Names of a whole checkpoint's weights (a folder or a hub name), no values read; empty where it has none."""
    for name in WEIGHTS:
        file = find_file(path, name)
        if file is None:
            continue
        try:
            return list(_names_in(file))
        except UNREADABLE as error:
            raise UserError(f"checkpoint {path}: weights cannot be read ({str(error).splitlines()[0]})") from error
    return []


def holds_encoder(path: str) -> bool:
    """Whether a checkpoint brings the weights of its encoder."""
    return any(name.startswith(TOWER) for name in weight_names(path))


def find_file(path: str, name: str) -> str | None:
    """Where a model's file lies, in its folder or (fetched, for a hub name) in the cache; None where it has none."""
    if os.path.isdir(path):
        file = os.path.join(path, name)
        return file if os.path.isfile(file) else None
    from transformers.utils import cached_file

    try:
        found = cached_file(path, name, local_files_only=out_of_reach(), _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else str(found)


def _names_in(file: str) -> Iterable[str]:
    if file.endswith(".json"):
        values = read_json(file, "the download again")
        return values.get("weight_map") or {} if isinstance(values, dict) else {}
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    values = torch.load(file, map_location="meta", weights_only=True)
    return values if isinstance(values, dict) else {}
