"""Sizes of known language models, encoders and settings, as plain numbers. Read by `flops`; imports no torch.

A setting is one family at one resolution: how many visual tokens an image takes, dense and skipping.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError


@dataclass(frozen=True)
class LlmSize:
    """A LLaMA-shaped decoder. Field names are `LlamaConfig`'s."""

    hidden_size: int
    """C."""
    intermediate_size: int
    """M."""
    num_hidden_layers: int
    """L."""
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class EncoderSize:
    """A CLIP-shaped vision transformer, up to the block whose output is used."""

    hidden_size: int
    """E."""
    intermediate_size: int
    num_blocks: int
    """Blocks that run: hidden state -2 of 24 layers needs 23."""
    patch_size: int
    patches: int
    """N of one view."""


@dataclass(frozen=True)
class Setting:
    """One family at one resolution."""

    encoder: EncoderSize
    views: int
    """Views of one image that the encoder sees."""
    dense_tokens: int
    """Visual tokens of one image without skipping."""
    num_retained: int | None
    """The paper's setting, or None where it gives none."""
    num_skipped: int | None
    windows: tuple[tuple[int, int], ...] = ()
    """CoS: (window in cells, queries) a scale of the resampler. Empty: an MLP on every patch."""
    projector_depth: int = 2
    """Linear layers of that MLP."""


LLMS: dict[str, LlmSize] = {
    "llama-3-8b": LlmSize(4096, 14336, 32, 32, 8, 128256),
    "vicuna-7b": LlmSize(4096, 11008, 32, 32, 32, 32000),
}

CLIP_L_336 = EncoderSize(1024, 4096, 23, 14, 576)
CLIP_L_224 = EncoderSize(1024, 4096, 22, 14, 256)
CLIP_L_448 = EncoderSize(1024, 4096, 22, 14, 1024)

FAMILIES: dict[str, dict[str, Setting]] = {
    "llava": {
        "100_156": Setting(CLIP_L_336, 1, 576, 100, 156),
        "256_320": Setting(CLIP_L_336, 1, 576, 256, 320),
        "64_156": Setting(CLIP_L_336, 1, 576, 64, 156),
    },
    "llava_hd": {"2x2": Setting(CLIP_L_336, 5, 2880, 576, 576)},
    "cos": {
        "cos_1296": Setting(CLIP_L_448, 1, 1296, 272, 256, ((32, 16), (4, 256), (2, 1024))),
        "cos_336": Setting(CLIP_L_448, 1, 336, None, None, ((32, 16), (8, 64), (4, 256))),
        "cos_80_448": Setting(CLIP_L_448, 1, 80, None, None, ((32, 16), (8, 64))),
        "cos_80": Setting(CLIP_L_224, 1, 80, None, None, ((16, 16), (4, 64))),
    },
}
"""Family -> presets; the first preset of a family is its default."""


def find_setting(family: str, preset: str | None) -> tuple[str, Setting]:
    """(name, setting) of a family's preset, its first by default; `UserError` lists the known ones."""
    if family not in FAMILIES:
        raise UserError(f"--family: unknown family {family!r}; known: {', '.join(FAMILIES)}")
    presets = FAMILIES[family]
    name = preset or next(iter(presets))
    if name not in presets:
        raise UserError(f"--preset: unknown preset {name!r} of family {family!r}; known: {', '.join(presets)}")
    return name, presets[name]


def read_llm(text: str) -> LlmSize:
    """A name of `LLMS`, or all of `LlmSize`'s fields as `name=number,...`; `UserError` lists what is known."""
    if text in LLMS:
        return LLMS[text]
    known = [field.name for field in fields(LlmSize)]
    if "=" not in text:
        raise UserError(
            f"--llm-config: unknown language model {text!r}; known: {', '.join(LLMS)}; or sizes, {'=N,'.join(known)}=N"
        )
    values: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in known or not value.isdigit() or int(value) < 1:
            raise UserError(f"--llm-config: cannot read {part.strip()!r}; write name=number of: {', '.join(known)}")
        values[name] = int(value)
    absent = [name for name in known if name not in values]
    if absent:
        raise UserError(f"--llm-config: {', '.join(absent)} missing; give all of: {', '.join(known)}")
    return LlmSize(**values)


def read_model_config(folder: str) -> dict[str, Any]:
    """config.json of a LLaVA checkpoint; `UserError` where it is absent or describes no encoder."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--model-path {folder}: no readable config.json there; name a checkpoint's folder") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    absent = [name for name in (*asdict(LLMS["llama-3-8b"]), "vision_config") if not config.get(name)]
    if absent:
        raise UserError(f"--model-path {folder}: config.json has no {', '.join(absent)}; is it a LLaVA checkpoint?")
    return config


def llm_of(config: dict[str, Any]) -> LlmSize:
    """Sizes of the language model that a config.json describes."""
    return LlmSize(**{field.name: config[field.name] for field in fields(LlmSize)})


def encoder_of(config: dict[str, Any]) -> EncoderSize:
    """Sizes of the encoder that a config.json describes, up to its selected hidden state."""
    vision = config["vision_config"]
    layer = config.get("mm_vision_select_layer", -2)
    return EncoderSize(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_blocks=layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer,
        patch_size=vision["patch_size"],
        patches=(vision["image_size"] // vision["patch_size"]) ** 2,
    )


def projector_depth_of(config: dict[str, Any]) -> int:
    """Linear layers of the projector that a config.json names: `identity`, `linear` or `mlp{k}x_gelu`."""
    name = config.get("mm_projector_type", "mlp2x_gelu")
    depths = {"identity": 0, "linear": 1, **{f"mlp{k}x_gelu": k for k in range(1, 10)}}
    if name not in depths:
        raise UserError(f"config.json: mm_projector_type {name!r} has no FLOPs count; known: {', '.join(depths)}")
    return depths[name]
