"""transformers' own LLaVA and LLaVA-NeXT (`llava-hf/...`) described in this project's terms.

A folder that `save_pretrained` wrote comes in, a `Plan` leaves; no weight is read. Called by converting. What the
models here cannot do is a `UserError` that names the field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from llava_sv.errors import UserError, in_words
from llava_sv.model.builders.tokenizer import read_tokenizer
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.model.multimodal_encoder.builder import VISION_TOWERS
from llava_sv.release import hf_processor
from llava_sv.release.chat_templates import read_jinja, template_of
from llava_sv.release.hf_names import style_of, to_ours
from llava_sv.release.image_token import without_image_token
from llava_sv.release.layouts import read_values
from llava_sv.release.plan import Plan
from llava_sv.release.wanted import NOT_READ
from llava_sv.release.weights import Entry, open_weights
from llava_sv.tiling import ANYRES

JUNK = (
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
)
"""Fields of a nested config that say nothing about the model."""


def read(source: Path) -> Plan:
    """The checkpoint at `source`. Raises `UserError` for what is broken, and for what the models here cannot do."""
    values = read_values(source)
    theirs = _config(values, source / "config.json")
    notes: list[str] = []
    entries = _entries(source, notes)
    tokenizer = read_tokenizer(str(source))
    processor = hf_processor.read_theirs(source)
    image_processor, aspect = hf_processor.to_ours(processor, source)
    config = make_config(theirs, values, source / "config.json")
    is_next = theirs.model_type == "llava_next"
    if is_next != (aspect == ANYRES):
        raise UserError(
            f"{source}: model_type {theirs.model_type!r} and the image processor "
            f"{hf_processor.kind_of(processor)!r} do not belong together"
        )
    if is_next:
        _check_pinpoints(theirs, processor, source)
    config["image_aspect_ratio"] = aspect
    config["conv_template"], said = template_of(read_jinja(source, tokenizer), tokenizer)
    if said:
        mend = "" if config["conv_template"] else "; name one with --conv-template here, or at each chat"
        notes.append(f"prompts: {said}{mend}")
    notes += hf_processor.note_on_pixels(processor, image_processor, config)
    plan = Plan(source, "hf", config, entries, tokenizer, image_processor, notes)
    without_image_token(plan)
    return plan


def _config(values: dict[str, Any], path: Path) -> Any:
    """transformers' config of these values, with its defaults where they are silent."""
    from transformers import LlavaConfig, LlavaNextConfig

    for part, known in (("text_config", tuple(DECODERS)), ("vision_config", tuple(VISION_TOWERS))):
        nested = values.get(part)
        kind = nested.get("model_type") if isinstance(nested, dict) else None
        if kind not in known:
            raise UserError(f"{path}: {part}.model_type is {kind!r}; known here: {', '.join(known)}")
    reader: Any = LlavaNextConfig if values["model_type"] == "llava_next" else LlavaConfig
    try:
        config = reader.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a {reader.__name__} ({in_words(error)})") from error
    _check(config, path)
    return config


def _check(config: Any, path: Path) -> None:
    """One line for each thing that the models here lack, naming the field."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UserError(f"{path}: vision_feature_layer {layer!r}: features of several layers are not read here; one is")
    if config.projector_hidden_act != "gelu":
        raise UserError(f"{path}: projector_hidden_act {config.projector_hidden_act!r}: projectors here have 'gelu'")
    if not config.multimodal_projector_bias:
        raise UserError(f"{path}: multimodal_projector_bias false: projectors here have a bias")
    kind = config.vision_config.model_type
    has_cls = VISION_TOWERS[kind].extra_tokens > 0
    if strategy == "default" and not has_cls:
        raise UserError(
            f"{path}: vision_feature_select_strategy 'default' drops the first token, which of {kind} is a patch; "
            "only 'full' is read with it"
        )
    if strategy == "full" and has_cls and config.model_type == "llava_next":
        raise UserError(
            f"{path}: vision_feature_select_strategy 'full': tiles have no place for {kind}'s CLS token; 'default' has"
        )


def _check_pinpoints(config: Any, processor: Any, source: Path) -> None:
    theirs = [list(one) for one in config.image_grid_pinpoints]
    if theirs != [list(one) for one in processor.image_grid_pinpoints]:
        raise UserError(
            f"{source}: image_grid_pinpoints are {theirs} in config.json and {processor.image_grid_pinpoints} in the "
            "image processor; make them the same"
        )
    side = config.vision_config.image_size
    odd = next((one for one in theirs if one[0] % side or one[1] % side), None)
    if odd is not None:
        raise UserError(f"{source}: image_grid_pinpoints {odd} is no multiple of the encoder's {side} pixels")


def make_config(theirs: Any, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """This project's config.json for transformers' `theirs`; `values` are what the file says."""
    text = {name: value for name, value in theirs.text_config.to_dict().items() if name not in JUNK}
    vision = {name: value for name, value in theirs.vision_config.to_dict().items() if name not in JUNK}
    vision["model_type"] = theirs.vision_config.model_type
    has_cls = VISION_TOWERS[vision["model_type"]].extra_tokens > 0
    is_next = theirs.model_type == "llava_next"
    decoder = DECODERS[theirs.text_config.model_type]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if values.get(name) is not None and text.get(name) is None:
            text[name] = values[name]
    text |= {
        "tie_word_embeddings": bool(theirs.tie_word_embeddings),
        "mm_family": "llava_hd" if is_next else "llava",
        "mm_vision_tower": (values.get("vision_config") or {}).get("_name_or_path") or None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": theirs.vision_config.hidden_size,
        "mm_vision_select_layer": theirs.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch"
        if has_cls and theirs.vision_feature_select_strategy == "full"
        else "patch",
    }
    if is_next:
        text["image_grid_pinpoints"] = hf_processor.swapped(theirs.image_grid_pinpoints)
    try:
        config: Any = decoder.config(**text, vision_config=vision)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{path}: text_config cannot be read ({in_words(error)})") from error
    made = config.to_dict()
    made |= {"architectures": [decoder.model.__name__], "dtype": _dtype(values)}
    made.pop("transformers_version", None)
    return made


def _dtype(values: dict[str, Any]) -> str | None:
    for holder in (values, values.get("text_config") or {}):
        said = holder.get("dtype") or holder.get("torch_dtype")
        if isinstance(said, str):
            return said
    return None


def _entries(source: Path, notes: list[str]) -> list[Entry]:
    found = open_weights(source)
    style = style_of(entry.name for entry in found)
    entries, left = [], []
    for entry in found:
        if NOT_READ.search(entry.name):
            left.append(entry.name)
            continue
        name = to_ours(entry.name, style)
        if name is None:
            raise UserError(
                f"checkpoint {source}: has a weight of no part of a LLaVA, {entry.name} (in {entry.file}); does "
                "config.json belong to these weights?"
            )
        entries.append(entry.renamed(name))
    if left:
        notes.append(f"weights: {len(left)} buffer(s) left out that models make by themselves ({left[0]}, ...)")
    return entries
