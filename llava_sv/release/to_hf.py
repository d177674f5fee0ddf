"""A `Plan` written as transformers' own LLaVA or LLaVA-NeXT (`llava-hf/...`). Called by converting.

Their models are dense and have one kind of projector: what they cannot do is a `UserError` that says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_sv.constants import DEFAULT_IMAGE_TOKEN
from llava_sv.conversation import CONV_TEMPLATES
from llava_sv.errors import UserError
from llava_sv.model.config import LlavaFields, patches_of
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE, DECODERS
from llava_sv.model.multimodal_encoder.builder import VISION_TOWERS
from llava_sv.release import hf_processor, kept
from llava_sv.release.chat_templates import FILE, jinja_for
from llava_sv.release.from_hf import JUNK
from llava_sv.release.hf_names import Style, to_theirs
from llava_sv.release.image_token import with_image_token
from llava_sv.release.plan import Plan
from llava_sv.release.tokenizer_files import write_chat_template, write_generation, write_tokenizer
from llava_sv.release.weights import Entry, write_weights
from llava_sv.tiling import ANYRES, default_pinpoints


def write(plan: Plan, folder: Path, shard_bytes: int | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """Fill `folder`; returns what the way back must know (for the record of the conversion). Notes go to the plan."""
    check(plan)
    made, token = with_image_token(plan)
    plan.notes[:] = made.notes
    hf_processor_made = hf_processor.to_theirs(plan.image_processor, made.config)
    plan.notes += hf_processor.note_on_pixels(hf_processor_made, plan.image_processor, made.config)
    make_config(made).save_pretrained(folder)
    _write_processor(made, hf_processor_made, folder)
    write_generation(plan, folder)
    write_weights(folder, _renamed(made), shard_bytes, dtype)
    return {"image_token": token} if token else {}


def check(plan: Plan) -> None:
    """`UserError`, one line, for a model that transformers' classes cannot be."""
    config, where = plan.config, f"checkpoint {plan.source}"
    family, aspect = config["mm_family"], config["image_aspect_ratio"] or "square"
    if family == "cos":
        raise UserError(f"{where}: --to hf has no multi-scale resampler: a model of family cos stays in layout sv")
    if config.get("skip_vision"):
        raise UserError(
            f"{where}: skips visual tokens, which transformers' own classes cannot; pass --drop-skip for the "
            "dense model"
        )
    if family == "llava_hd" and aspect != ANYRES:
        raise UserError(
            f"{where}: --to hf has no tiles by grid (image_aspect_ratio {aspect!r}): only 'anyres' is LLaVA-NeXT"
        )
    if family == "llava_hd" and not any(entry.name.endswith("mm_projector.image_newline") for entry in plan.entries):
        raise UserError(f"{where}: lacks image_newline, which LLaVA-NeXT needs; train it dense with 'anyres' first")
    if config["mm_projector_type"] != "mlp2x_gelu":
        raise UserError(
            f"{where}: mm_projector_type {config['mm_projector_type']!r}: transformers' projector is mlp2x_gelu"
        )


def make_config(plan: Plan) -> Any:
    """transformers' config of a plan whose tokenizer has `<image>`."""
    from transformers import LlavaConfig, LlavaNextConfig

    config = plan.config
    is_next = config["mm_family"] == "llava_hd"
    vision = dict(config["vision_config"])
    text = _text_config(config)
    has_cls = VISION_TOWERS[vision["model_type"]].extra_tokens > 0
    side = vision["image_size"]
    values: dict[str, Any] = {
        "text_config": text,
        "vision_config": {name: value for name, value in vision.items() if name == "model_type" or name not in JUNK},
        "image_token_index": int(plan.tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)),
        "image_seq_length": patches_of(vision) + int(_full(config) and has_cls),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "full" if _full(config) or not has_cls else "default",
        "vision_feature_layer": config["mm_vision_select_layer"],
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }
    if is_next:
        values["image_grid_pinpoints"] = hf_processor.swapped(config["image_grid_pinpoints"] or default_pinpoints(side))
    kind: Any = LlavaNextConfig if is_next else LlavaConfig
    name = "LlavaNextForConditionalGeneration" if is_next else "LlavaForConditionalGeneration"
    return kind.from_dict({**values, "architectures": [name], "dtype": config.get("dtype")})


def _full(config: dict[str, Any]) -> bool:
    return config["mm_vision_select_feature"] == "cls_patch"


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's own fields, with its `model_type`."""
    decoder = BY_MODEL_TYPE[config["model_type"]]
    kind = next(name for name, one in DECODERS.items() if one is decoder)
    ours = set(LlavaFields.__annotations__) | set(JUNK)
    return {"model_type": kind, **{name: value for name, value in config.items() if name not in ours}}


def _write_processor(plan: Plan, image_processor: Any, folder: Path) -> None:
    from transformers import LlavaNextProcessor, LlavaProcessor

    config = plan.config
    vision = config["vision_config"]
    has_cls = VISION_TOWERS[vision["model_type"]].extra_tokens > 0
    kind: Any = LlavaNextProcessor if config["mm_family"] == "llava_hd" else LlavaProcessor
    template = CONV_TEMPLATES.get(config.get("conv_template") or "")
    made = kind(
        image_processor,
        plan.tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="full" if _full(config) or not has_cls else "default",
        num_additional_image_tokens=int(has_cls),
    )
    made.save_pretrained(folder)
    write_tokenizer(plan, folder)
    if template is None:
        write_chat_template(plan, folder)
    else:
        (folder / FILE).write_text(jinja_for(template, plan.tokenizer), encoding="utf-8")


def _renamed(plan: Plan) -> list[Entry]:
    said = kept.record(plan.source).get("names")
    style = Style(**said) if isinstance(said, dict) else Style()
    entries = []
    for entry in plan.entries:
        name = to_theirs(entry.name, style)
        if name is None:
            raise UserError(f"checkpoint {plan.source}: {entry.name} has no place in transformers' model")
        entries.append(entry.renamed(name))
    return entries
