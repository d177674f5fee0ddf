"""A dense `Plan` to a folder that LLaVA's own code loads: its names, its config.json, safetensors.

Called by converting.

The encoder is left out where it is the one that `mm_vision_tower` names, as LLaVA-1.5 has it; where it was trained, it
is written, with the field that makes LLaVA read it (`unfreeze_mm_vision_tower`), as LLaVA-1.6 has it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from llava_sv.errors import UserError
from llava_sv.files import write_json
from llava_sv.model.llava_layout import NEWLINE, OUR_NEWLINE, TOWER, UNPAD, find_file
from llava_sv.model.multimodal_encoder.builder import read_vision_config
from llava_sv.release.from_llava import cast, open_encoder
from llava_sv.release.plan import Plan
from llava_sv.release.weights import SHARD_BYTES, Entry, write_weights
from llava_sv.tiling import ANYRES, default_pinpoints

THEIR_TYPES = {
    "llava_llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "llava_mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "llava_qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
"""Our `model_type` -> LLaVA's, and its class."""

OURS_ALONE = (
    "mm_family",
    "vision_config",
    "skip_vision",
    "hd_max_tiles",
    "hd_fixed_grid",
    "cos_windows",
    "cos_queries",
    "mm_vision_feature_levels",
    "mm_vision_image_size",
    "conv_template",
)
"""Fields that LLaVA does not know."""

DEFAULTS: dict[str, Any] = {
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_resampler_type": None,
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "image_grid_pinpoints": None,
}
"""What LLaVA's config.json always has, where the plan has none of it."""

OLD_NAMES = {"dtype": "torch_dtype"}
"""Fields of transformers 5 -> those of the versions that LLaVA runs on."""

TEXT_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a tokenizer: copied, so that they stay the same byte for byte."""


def write(
    plan: Plan,
    folder: Path,
    shard_bytes: int | None = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    vision_tower: str | None = None,
) -> None:
    """Fill `folder` (which exists) with weights, config.json, tokenizer and image processor, in LLaVA's layout.

    shard_bytes, dtype: see `write_weights`. vision_tower: where the encoder that `mm_vision_tower` names lies, to tell
    whether the plan's was trained. Adds to plan.notes what the user should know. Raises `UserError` for a plan that
    LLaVA's code has no place for.
    """
    check_expressible(plan)
    entries = [entry.renamed(NEWLINE) if entry.name == OUR_NEWLINE else entry for entry in plan.entries]
    leave_out, said = _encoder_is_named(plan, vision_tower)
    if leave_out:
        entries = [entry for entry in entries if not entry.name.startswith(TOWER)]
    plan.notes.append(said)
    config = their_config(plan)
    config["unfreeze_mm_vision_tower"] = not leave_out
    if dtype is not None:
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_weights(folder, entries, shard_bytes, dtype)
    write_json(folder / "config.json", dict(sorted(config.items())))
    _write_beside(plan, folder, config)
    plan.notes += _limits(plan, config)
    also = " and 'mistral'" if config["model_type"] == "llava_mistral" else ""
    plan.notes.append(f"LLaVA's code goes by a folder's name: keep 'llava'{also} in it, and no 'lora'")


def check_expressible(plan: Plan) -> None:
    """`UserError` for what LLaVA's code cannot run."""
    config, where = plan.config, f"checkpoint {plan.source}"
    if config.get("skip_vision") is not None:
        raise UserError(f"{where}: skips visual tokens, which LLaVA's code cannot; --drop-skip makes it dense")
    family = config.get("mm_family") or "llava"
    if family == "cos":
        raise UserError(f"{where}: is of family cos (Chain-of-Sight), whose resampler LLaVA's code lacks; use --to sv")
    if family == "llava_hd" and config.get("image_aspect_ratio") != ANYRES:
        raise UserError(
            f"{where}: cuts images into tiles in a way (image_aspect_ratio {config.get('image_aspect_ratio')!r}) that "
            f"LLaVA's code lacks, which has {ANYRES!r} alone; use --to sv"
        )
    if config["model_type"] not in THEIR_TYPES:
        known = ", ".join(name.removeprefix("llava_") for name in THEIR_TYPES)
        raise UserError(f"{where}: LLaVA's code has no {config['model_type']} ({known}); use --to sv or --to hf")
    if not config.get("mm_vision_tower"):
        raise UserError(
            f"{where}: config.json names no mm_vision_tower, which LLaVA's code builds its encoder from; "
            "say it by --vision-tower"
        )


def their_config(plan: Plan) -> dict[str, Any]:
    """LLaVA's config.json of a plan that it can express."""
    config = {name: value for name, value in plan.config.items() if name not in OURS_ALONE}
    config["model_type"], architecture = THEIR_TYPES[plan.config["model_type"]]
    config["architectures"] = [architecture]
    for new, old in OLD_NAMES.items():
        if new in config:
            config[old] = config.pop(new)
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        kind = rope.get("rope_type", "default")
        config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = None if kind == "default" else {**scaling, "type": kind}
    for name, value in DEFAULTS.items():
        config.setdefault(name, value)
    if plan.config.get("image_aspect_ratio") == ANYRES:
        config["mm_patch_merge_type"] = UNPAD
        if not config.get("image_grid_pinpoints"):
            side = plan.config["vision_config"]["image_size"]
            config["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in default_pinpoints(side)]
    return config


def _limits(plan: Plan, config: dict[str, Any]) -> list[str]:
    """What only some of LLaVA's code reads, and what only this machine has."""
    notes = []
    newer = [config["model_type"]] if config["model_type"] == "llava_qwen" else []
    newer += ["SigLIP"] if plan.config["vision_config"]["model_type"].startswith("siglip") else []
    if newer:
        notes.append(f"{' and '.join(newer)}: read by the code of LLaVA-NeXT, not by that of LLaVA-1.5")
    if Path(config["mm_vision_tower"]).is_dir():
        notes.append(
            f"mm_vision_tower is a folder of this machine ({config['mm_vision_tower']}); "
            "before the result is passed on, write the encoder's published name there"
        )
    return notes


# -- the encoder ------------------------------------------------------------------------------------------------------


def _encoder_is_named(plan: Plan, vision_tower: str | None) -> tuple[bool, str]:
    """Whether the plan's encoder is the one that `mm_vision_tower` names, and a line that says so."""
    name = str(plan.config["mm_vision_tower"])
    trained = plan.config.get("unfreeze_mm_vision_tower")
    held = [entry for entry in plan.entries if entry.name.startswith(TOWER)]
    if trained:
        return False, f"vision encoder: written, since it was trained (unfreeze_mm_vision_tower); it came from {name}"
    where = vision_tower or _at_hand(name)
    if where is not None and _same_encoder(held, where, plan):
        return True, f"vision encoder: left out, it is {name} unchanged, which LLaVA's code loads by that name"
    if where is not None:
        return False, f"vision encoder: written, since its weights are not those of {name}"
    if trained is False:
        return True, f"vision encoder: left out, config.json says that {name} was frozen, which LLaVA's code loads"
    return False, f"vision encoder: written, since {name} is not here to compare it with"


def _at_hand(name: str) -> str | None:
    """`name` where its weights can be read without a network."""
    if Path(name).is_dir():
        return name
    from llava_sv.train.preflight import find_model

    found = find_model(name)
    return None if found is None else str(found)


def _same_encoder(held: list[Entry], where: str, plan: Plan) -> bool:
    kind = plan.config["vision_config"]["model_type"]
    if read_vision_config(where).model_type != kind:
        return False
    named = {entry.name: entry for entry in open_encoder(where, kind)}
    if {entry.name: entry.shape for entry in held} != {name: entry.shape for name, entry in named.items()}:
        return False
    return all(torch.equal(entry.load(), cast(named[entry.name], entry.dtype).load()) for entry in held)


# -- beside the weights -----------------------------------------------------------------------------------------------


def _write_beside(plan: Plan, folder: Path, config: dict[str, Any]) -> None:
    """Tokenizer, image processor and generation config: the source's own files where it has them."""
    own = plan.layout in ("llava", "sv")
    found = [file for name in TEXT_FILES if own and (file := find_file(str(plan.source), name))]
    for file in found:
        shutil.copyfile(file, folder / Path(file).name)
    if not found and plan.tokenizer is not None:
        plan.tokenizer.save_pretrained(folder)
    if plan.image_processor is not None:
        plan.image_processor.save_pretrained(folder)
    generation = find_file(str(plan.source), "generation_config.json")
    if generation is not None:
        shutil.copyfile(generation, folder / "generation_config.json")
    else:
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        write_json(folder / "generation_config.json", ids)
