"""The files of a release, written into a folder: weights, settings, tokenizer, processor, code, card, manifest.

A `Source` and what was asked for come in; the same bytes go out whenever, wherever and however often it is called.
Nothing but what loading needs is taken along: no optimizer, no pickle, no log. Called by `release`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_sv import __version__
from llava_sv.conversation import CONV_TEMPLATES, get_template
from llava_sv.errors import UserError
from llava_sv.files import read_json, write_text
from llava_sv.mm_utils import load_image_processor
from llava_sv.model.builders.tokenizer import load_tokenizer
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE
from llava_sv.model.loading import read_config, read_config_json
from llava_sv.processing import SETTINGS, LlavaSvProcessor
from llava_sv.release import manifest
from llava_sv.release.portable import left_out, make_portable, portable_name, without_local, write_sorted
from llava_sv.release.releasable import Source, encoder_is_inside
from llava_sv.release.self_contained import write_code
from llava_sv.release.wanted import Wanted, refuse_mismatch, wanted_by
from llava_sv.release.weights import SHARD_BYTES, Entry, open_weights, torch_dtype, write_weights


@dataclass
class Content:
    """What goes into a release. card: a function of no arguments that makes the card, an object with `text` and
    `files`; None leaves it out."""

    source: Source
    name: str
    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    conv_template: str | None = None
    card: Any = None
    notes: list[str] = field(default_factory=list)
    """What the user should be told; added to while files are written."""


def config_values(
    checkpoint: Path, dtype: str | None, conv_template: str | None, dropped: list[str] | None = None
) -> dict[str, Any]:
    """config.json of the release of a whole checkpoint; fields that are left out unforeseen go to `dropped`.

    Raises `UserError` for one that is not all inside its folder, or that does not say how it is spoken to.
    """
    read_config(str(checkpoint))
    _, values = read_config_json(str(checkpoint))
    if not encoder_is_inside(values):
        raise UserError(
            f"checkpoint {checkpoint}: names its encoder ({values.get('mm_vision_tower')}) instead of holding it; run "
            "llava-sv convert --to sv first, and release what that makes"
        )
    if values.get("quantization_config"):
        raise UserError(f"checkpoint {checkpoint}: holds quantised weights; release the weights they were made of")
    template = conv_template or values.get("conv_template")
    if template is None:
        raise UserError(
            f"checkpoint {checkpoint}: config.json names no conv_template; say which one the model was trained with, "
            f"--conv-template {{{','.join(CONV_TEMPLATES)}}}"
        )
    get_template(template)
    decoder = BY_MODEL_TYPE[values["model_type"]]
    portable = without_local(values, [] if dropped is None else dropped)
    portable |= {"model_type": decoder.model_type, "architectures": [decoder.model.__name__]}
    portable |= {"mm_vision_tower": portable_name(values["mm_vision_tower"]), "conv_template": template}
    portable.pop("auto_map", None)
    said = dtype or portable.get("dtype") or portable.get("torch_dtype")
    portable.pop("torch_dtype", None)
    if said is not None:
        portable["dtype"] = said
        portable["vision_config"]["dtype"] = said
    return portable


def checked_entries(checkpoint: Path, wanted: Wanted) -> list[Entry]:
    """The weights that the model loads, by layer; `UserError` where they and config.json do not belong together."""
    entries = open_weights(checkpoint)
    refuse_mismatch(checkpoint, wanted, {entry.name: entry.shape for entry in entries})
    return sorted((e for e in entries if e.name in wanted.shapes), key=lambda entry: _natural(entry.name))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """So that layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def write_release(folder: Path, content: Content) -> dict[str, Any]:
    """Fill the empty `folder`; returns manifest.json's values. Raises `UserError` before the first byte of weights is
    written for what does not fit together."""
    whole = content.source.whole
    dropped: list[str] = []
    values = config_values(whole, content.dtype, content.conv_template, dropped)
    content.notes += [left_out("config.json", field) for field in dropped if field != "mm_vision_tower"]
    entries = checked_entries(whole, wanted_by(read_config(str(whole))))
    tokenizer = load_tokenizer(str(whole))
    image_processor = load_image_processor(str(whole), values.get("mm_vision_image_size"))
    card = content.card() if content.card is not None else None
    write_sorted(folder / "config.json", values)
    write_sorted(folder / "generation_config.json", _generation(whole, values, tokenizer))
    _write_processor(folder, values, tokenizer, image_processor)
    write_code(folder)
    if card is not None:
        _write_card(folder, card)
        if card.missing:
            content.notes.append(f"README.md: not recorded: {', '.join(card.missing)}")
    content.notes += make_portable(folder)
    write_weights(folder, entries, content.shard_bytes, torch_dtype(content.dtype))
    return manifest.make(folder, {"name": content.name, "llava_sv": __version__})


def _generation(whole: Path, values: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """generation_config.json: the checkpoint's, or one that ends where the template's turns end."""
    own = whole / "generation_config.json"
    if own.is_file():
        return read_json(own, "training again")
    stop = get_template(values["conv_template"]).stop_token
    ends = [tokenizer.eos_token_id, *([tokenizer.convert_tokens_to_ids(stop)] if stop else [])]
    ends = [token for token in dict.fromkeys(ends) if token is not None and token != tokenizer.unk_token_id]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _write_processor(folder: Path, values: dict[str, Any], tokenizer: Any, image_processor: Any) -> None:
    """Tokenizer, image processor and what holds the two, with the chat template."""
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    settings = {name: values[name] for name in SETTINGS if name in values}
    LlavaSvProcessor(image_processor, tokenizer, **settings).save_pretrained(folder)


def _write_card(folder: Path, card: Any) -> None:
    """README.md and the files beside it; none may take the place of another."""
    for name, data in sorted(card.files.items()):
        if not manifest.is_inside(name) or (folder / name).exists():
            raise UserError(f"model card: its file {name!r} has a name that is taken, or leads out of the release")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_text(folder / "README.md", card.text)
