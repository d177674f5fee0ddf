"""LLaVA's layout to a `Plan`: a whole checkpoint (v1.5, v1.6), a projector on its base, adapters on theirs.

Whole checkpoints and projectors are read tensor by tensor; adapters are added to their base in memory first. The
encoder comes along: from the checkpoint where it has one, else from where `mm_vision_tower` points. Called by
converting.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_sv.errors import UserError
from llava_sv.mm_utils import load_image_processor
from llava_sv.model import adapters
from llava_sv.model.builder import is_projector_only, load_pretrained_model, processor_source
from llava_sv.model.builders.tokenizer import load_tokenizer
from llava_sv.model.checkpoint_io import PROJECTOR_KEY, projector_file
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE, DECODERS
from llava_sv.model.llava_layout import (
    NEWLINE,
    OUR_NEWLINE,
    TOWER,
    as_ours,
    is_foreign,
)
from llava_sv.model.loading import read_config, read_config_json
from llava_sv.model.multimodal_encoder.builder import VISION_TOWERS, read_vision_config
from llava_sv.release.plan import Plan
from llava_sv.release.source import local_folder
from llava_sv.release.wanted import NOT_READ
from llava_sv.release.weights import Entry, entries_of, open_weights

ENCODER = f"{TOWER}vision_tower.vision_model."
"""Before the names of an encoder's own weights."""

OF_THE_FILE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)
"""Fields of config.json that describe the file rather than the model."""


def read(source: Path, vision_tower: str | None = None, base: str | None = None) -> Plan:
    """The checkpoint in `source` (a folder) as a plan.

    vision_tower: where the encoder lies that it names and does not hold; base: language model of a lone projector, or
    what adapters were trained on (default: what they remember). Raises `UserError` for what does not fit together.
    """
    source = Path(source)
    if adapters.is_adapter(str(source)):
        return _read_adapters(source, vision_tower, base)
    config = read_config(str(source), vision_tower)
    _, values = read_config_json(str(source))
    alone = is_projector_only(str(source))
    if base is not None and not alone:
        raise UserError(f"checkpoint {source}: is a whole model, which needs no base; drop --base")
    ours = as_ours(values) if is_foreign(values) else dict(values)
    if alone:
        ours, entries = _on_base(source, base, ours)
    else:
        entries = [_named_as_ours(entry) for entry in open_weights(source)]
    if "torch_dtype" in ours:
        ours["dtype"] = ours.pop("torch_dtype")
    ours["model_type"] = BY_MODEL_TYPE[ours["model_type"]].model_type
    ours["architectures"] = [BY_MODEL_TYPE[ours["model_type"]].model.__name__]
    tower = str(config.mm_vision_tower)
    vision = config.vision_config or read_vision_config(tower, config.mm_vision_image_size).to_dict()
    ours |= {"vision_config": vision, "mm_hidden_size": vision["hidden_size"]}
    entries = [entry for entry in entries if not NOT_READ.search(entry.name)]
    entries, said = _with_encoder(entries, tower, vision["model_type"])
    plan = Plan(source, "llava", ours, entries, notes=[said])
    if values.get("conv_template") is None:
        plan.notes.append(
            f"prompts: conv_template {ours['conv_template']} by the language model, since LLaVA's config.json names "
            "none; --conv-template names another"
        )
    plan.tokenizer = load_tokenizer(str(base if alone else source))
    plan.image_processor = load_image_processor(processor_source(str(source), config), config.mm_vision_image_size)
    return plan


def _named_as_ours(entry: Entry) -> Entry:
    return entry.renamed(OUR_NEWLINE) if entry.name == NEWLINE else entry


# -- the encoder ------------------------------------------------------------------------------------------------------


def _with_encoder(entries: list[Entry], tower: str, kind: str) -> tuple[list[Entry], str]:
    """The entries with the encoder's, and a line that says whose those are."""
    held = [entry for entry in entries if entry.name.startswith(TOWER)]
    if held:
        return entries, f"vision encoder: {len(held)} tensors of the checkpoint's own"
    dtype = next((entry.dtype for entry in entries if entry.dtype.is_floating_point), torch.float32)
    own = [cast(entry, dtype) for entry in open_encoder(tower, kind)]
    return [*entries, *own], f"vision encoder: {len(own)} tensors of {tower}, which the checkpoint names"


def open_encoder(tower: str, kind: str) -> list[Entry]:
    """The weights of the encoder at `tower` (a folder or a hub name; its vision part or whole), unread, under this
    project's names. kind: `model_type` of its vision config."""
    entries = []
    for entry in open_weights(local_folder(tower)):
        name = entry.name.removeprefix("vision_model.")
        if not name.startswith(VISION_TOWERS[kind].other_weights) and not NOT_READ.search(name):
            entries.append(entry.renamed(ENCODER + name))
    return entries


def cast(entry: Entry, dtype: torch.dtype) -> Entry:
    """The tensor in another type, as loading makes it."""
    if entry.dtype == dtype or not entry.dtype.is_floating_point:
        return entry
    return replace(entry, dtype=dtype, load=lambda: entry.load().to(dtype))


# -- a projector on its base ------------------------------------------------------------------------------------------


def _on_base(source: Path, base: str | None, values: dict[str, Any]) -> tuple[dict[str, Any], list[Entry]]:
    """Fields and weights of a lone projector's LLaVA: the language model's own, and the projector's."""
    if base is None:
        raise UserError(f"checkpoint {source}: holds a projector alone; name its language model with --base")
    _, of_base = read_config_json(base)
    if of_base.get("model_type") not in DECODERS:
        known = ", ".join(DECODERS)
        raise UserError(
            f"--base {base}: its model_type is {of_base.get('model_type')!r}, no language model's ({known})"
        )
    own = {name: value for name, value in of_base.items() if name not in OF_THE_FILE}
    kept = {name: value for name, value in values.items() if name not in OF_THE_FILE}
    kept |= own | {"model_type": DECODERS[of_base["model_type"]].model_type}
    kept |= {name: of_base[name] for name in ("dtype", "torch_dtype") if name in of_base}
    entries = open_weights(local_folder(base))
    for entry in entries_of(Path(projector_file(str(source)))):
        if PROJECTOR_KEY in entry.name:
            entries.append(entry.renamed(f"model.{PROJECTOR_KEY}{entry.name.split(PROJECTOR_KEY, 1)[1]}"))
        elif entry.name.endswith("image_newline"):
            entries.append(entry.renamed(OUR_NEWLINE))
    return kept, entries


# -- adapters ---------------------------------------------------------------------------------------------------------


def _read_adapters(source: Path, vision_tower: str | None, base: str | None) -> Plan:
    """Adapters added to their base, in memory."""
    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(source), base, device="cpu", device_map=None, vision_tower=vision_tower
    )
    _, values = read_config_json(str(source))
    ours = as_ours(values) if is_foreign(values) else dict(values)
    config = model.config  # the base's own sizes and constants
    of_rope = ("rope_theta", "rope_scaling") if getattr(config, "rope_parameters", None) else ()
    ours = {name: value for name, value in ours.items() if name not in of_rope}
    ours |= {name: value for name, value in config.to_dict().items() if name not in OF_THE_FILE}
    ours |= {"model_type": config.model_type, "architectures": [type(model).__name__]}
    entries = [
        Entry(name, tuple(value.shape), value.dtype, source.name, lambda value=value: value)  # type: ignore[misc]
        for name, value in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    ]
    said = f"adapters of {source} added to their base {adapters.base_of(str(source), base)}"
    return Plan(source, "llava", ours, entries, tokenizer, image_processor, [said])
