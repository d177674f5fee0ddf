"""Whole checkpoints: config.json read and checked, weights loaded strictly. Shared by `builder` and `builders`."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import cached_file

from llava_sv.errors import UserError
from llava_sv.mm_utils import check_aspect_ratio
from llava_sv.model.checkpoint_io import load_strictly, out_of_reach
from llava_sv.model.compression.select import get_selector
from llava_sv.model.config import LlavaFields
from llava_sv.model.cos_presets import CUSTOM
from llava_sv.model.language_model.causal_lm import LlavaCausalLM
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE, model_class
from llava_sv.model.llava_layout import KEY_MAPPING, as_ours, holds_encoder, is_foreign, refuse_delta
from llava_sv.model.multimodal_encoder.builder import (
    check_selected_state,
    check_selection,
    read_vision_config,
)
from llava_sv.model.multimodal_encoder.pretrained import load_vision_tower
from llava_sv.model.multimodal_projector.builder import check_projector_type
from llava_sv.model.multimodal_projector.families import get_grouping
from llava_sv.model.splice import PADDING_SIDES
from llava_sv.model.token_counts import check_counts, selects
from llava_sv.tiling import ANYRES

logger = logging.getLogger(__name__)

CUT_BY_GRID: dict[str, tuple[str, ...]] = {"mm_family": ("llava_hd",), "image_aspect_ratio": ("pad", "square")}
CUT_BY_PINPOINTS: dict[str, tuple[str, ...]] = {"mm_family": ("llava_hd",), "image_aspect_ratio": (ANYRES,)}
ONLY_WITH: dict[str, dict[str, tuple[str, ...]]] = {
    "hd_max_tiles": CUT_BY_GRID,
    "hd_fixed_grid": CUT_BY_GRID,
    "image_grid_pinpoints": CUT_BY_PINPOINTS,
    "cos_windows": {"mm_projector_type": (CUSTOM,)},
    "cos_queries": {"mm_projector_type": (CUSTOM,)},
    "mm_vision_feature_levels": {"mm_family": ("cos",)},
    "mm_vision_select_layer": {"mm_family": ("llava", "llava_hd")},
    "mm_vision_select_feature": {"mm_family": ("llava",)},
}
"""Field of the config -> other fields, with the values under which it is read. Elsewhere it must keep its default."""

IN_WORDS = {"mm_family": "family"}


def read_config(model_path: str, vision_tower: str | None = None) -> LlavaFields:
    """config.json of this project's checkpoints or LLaVA's own: its `model_type` is a key of `BY_MODEL_TYPE`.

    `vision_config` stays None where the encoder's weights are not part of the checkpoint. vision_tower: where the
    encoder lies that the checkpoint only names. Raises `UserError`.
    """
    path, values = read_config_json(model_path)
    if "mm_vision_tower" not in values and "vision_config" in values and "text_config" in values:
        raise UserError(
            f"checkpoint {model_path}: is in the layout of transformers' own models (model_type "
            f"{values.get('model_type')!r}), which is not read as it is; "
            + (
                f"convert it: llava-sv convert {model_path} --to sv --out DIR"
                if values.get("model_type") in ("llava", "llava_next")
                else "take one of model_type llava or llava_next, or in LLaVA's layout (liuhaotian/llava-v1.5-7b)"
            )
        )
    if not is_llava(values):
        raise UserError(
            f"checkpoint {model_path}: config.json describes model_type {values.get('model_type')!r}, not a LLaVA "
            f"({', '.join(BY_MODEL_TYPE)}; with mm_vision_tower); make one of a language model by `llava-sv train`"
        )
    decoder = BY_MODEL_TYPE[values["model_type"]]
    foreign = is_foreign(values)
    if foreign:
        refuse_delta(model_path, values)
    try:
        values = as_ours(values) if foreign else values
        known = {k: v for k, v in values.items() if k not in ("model_type", "auto_map")}  # code beside it is not run
        config = strict_config(lambda: decoder.config.from_dict(known))
        if vision_tower is not None:
            _name_encoder(config, vision_tower, model_path)
        vision = config.vision_config
        if vision is None:
            vision = read_vision_config(config.mm_vision_tower, config.mm_vision_image_size).to_dict()
        check_config(config, vision)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    if foreign and holds_encoder(model_path):
        config.vision_config = vision
    if foreign:
        whose = config.mm_vision_tower if config.vision_config is None else "the checkpoint itself"
        logger.info("%s: the vision encoder's weights are those of %s", model_path, whose)
    return config


def _name_encoder(config: LlavaFields, vision_tower: str, model_path: str) -> None:
    if config.vision_config is not None and holds_encoder(model_path):  # a projector's or adapter's folder does not
        raise UserError(f"holds its encoder, so that {vision_tower} would not be read; drop --vision-tower")
    config.mm_vision_tower = vision_tower


def is_llava(values: dict[str, Any]) -> bool:
    """Whether a config.json's contents describe a LLaVA in this project's layout or LLaVA's own."""
    return values.get("model_type") in BY_MODEL_TYPE and "mm_vision_tower" in values


def strict_config(make: Callable[[], LlavaFields]) -> LlavaFields:
    """What `make` returns; a field of the wrong type or value, which the config class refuses, is a `UserError`."""
    try:
        return make()
    except StrictDataclassError as error:
        what = " ".join(part.strip() for part in str(error).splitlines())
        raise UserError(f"model config: {what}") from error


def check_config(config: LlavaFields, vision_config: dict[str, Any]) -> None:
    """What a config must hold to before a model is built of it; raises `UserError`."""
    get_grouping(config.mm_family)
    check_projector_type(config)
    check_selected_state(config, vision_config)
    check_aspect_ratio(config.image_aspect_ratio, config.mm_family)
    for name, why in not_read(config):
        raise UserError(f"{name} {why}; drop it")
    if config.tokenizer_padding_side not in PADDING_SIDES:
        known = ", ".join(PADDING_SIDES)
        raise UserError(f"tokenizer_padding_side: unknown {config.tokenizer_padding_side!r}; known: {known}")
    check_counts(described_by(config, vision_config))
    skip = config.skip_vision
    if skip is None:
        return
    get_selector(skip.selection)
    if selects(described_by(config, vision_config)):
        check_selection(skip.selection, vision_config)
    skip.layers_that_skip(config.num_hidden_layers)
    if config.mm_vision_select_feature != "patch":
        raise UserError("skip_vision works on patches: set mm_vision_select_feature to 'patch'")


def not_read(config: LlavaFields) -> Iterator[tuple[str, str]]:
    """Fields that are set and that a model of this config would not read, each with what it is for."""
    defaults = {field.name: field.default for field in fields(LlavaFields)}
    for name, needs in ONLY_WITH.items():
        if getattr(config, name) == defaults[name]:
            continue
        for other, known in needs.items():
            value = getattr(config, other) or "square"  # an image_aspect_ratio of None; the others are never empty
            if value not in known:
                yield name, f"is for {IN_WORDS.get(other, other)} {' or '.join(known)}, not {value}"
                break


def described_by(config: LlavaFields, vision_config: dict[str, Any]) -> LlavaFields:
    """The config with its encoder described, also where the checkpoint names the encoder instead of holding it."""
    described = copy.copy(config)
    described.vision_config = vision_config
    return described


def load_whole(
    path: str,
    config: LlavaFields,
    new_weights: tuple[str, ...] = (),
    dtype: Any = None,
    attn_implementation: str | None = None,
    unused_weights: tuple[str, ...] = (),
    **options: Any,
) -> LlavaCausalLM:
    """The model at `path` as `config` describes it; keys must match but for prefixes that may be missing
    (`new_weights`) or left over (`unused_weights`).

    Where the checkpoint names its encoder instead of holding it, the encoder is loaded from `config.mm_vision_tower`.
    """
    model: LlavaCausalLM = load_strictly(
        model_class(config),
        path,
        new_weights=new_weights,
        unused_weights=(*unused_weights, *(() if config.vision_config else ("model.vision_tower.",))),
        config=config,
        attn_implementation=attn_implementation,
        dtype=dtype or "auto",
        key_mapping=KEY_MAPPING,
        **options,
    )
    _forget(model, KEY_MAPPING)
    if config.vision_config is None:
        tower = load_vision_tower(str(config.mm_vision_tower), model.config, dtype=model.dtype)
        model.get_model().attach_vision_tower(tower.to(model.device))
    return model


def _forget(model: Any, mapping: dict[str, str]) -> None:
    """Have transformers save the model under this project's names, whatever the names it was loaded from."""
    targets = set(mapping.values())
    for table in (getattr(model, "_weight_conversions", None),):
        if table:
            model._weight_conversions = [one for one in table if not targets & set(one.target_patterns)]


def read_config_json(model_path: str) -> tuple[str, dict[str, Any]]:
    """(path, contents) of a model's config.json, from a folder or the hub. Raises `UserError`."""
    path = os.path.join(model_path, "config.json")
    if os.path.isdir(model_path) and not os.path.isfile(path):
        raise UserError(f"checkpoint {model_path}: has no config.json; give the folder that training wrote")
    if not os.path.isdir(model_path):
        try:
            path = str(cached_file(model_path, "config.json", local_files_only=out_of_reach()))
        except OSError as error:
            why = str(error).splitlines()[0]
            raise UserError(f"checkpoint {model_path}: no such folder, and it cannot be fetched ({why})") from error
    try:
        with open(path, encoding="utf-8") as file:
            return path, json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
