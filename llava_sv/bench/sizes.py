"""What the benchmarks run: model sizes and batches by name. Read by `bench train` and `bench infer`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from llava_sv.bench.answer import BYTES
from llava_sv.bench.presets import LLMS, LlmSize
from llava_sv.errors import UserError

LEAST_TEXT = 4
"""Text tokens of a sample: one before the image, and some that carry loss."""

DTYPE_NAMES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", **{d: d for d in BYTES}}
"""What `--dtype` takes -> torch's name for it."""


@dataclass(frozen=True)
class BenchSize:
    """A model of one family, of random weights, and the batch it is given."""

    llm: LlmSize
    vision: dict[str, Any]
    """Fields of `CLIPVisionConfig`."""
    batch: int
    """Samples, each with one image."""
    text_tokens: int
    """Text tokens a sample; all but the first `text_before` follow the image, and half of all carry the loss."""
    num_retained: int
    num_skipped: int
    new_tokens: int
    """`bench infer`: tokens generated."""
    repeats: int
    """Rounds that are measured, by default."""
    family: str = "llava"
    settings: dict[str, Any] = field(default_factory=dict)
    """Further fields of `LlavaConfig`."""
    all_layers: int | None = None
    """Decoder layers of the whole model, where this is a slice of it."""

    @property
    def layers_text(self) -> str:
        """Such as `4 of 32 layers`; empty for a whole model."""
        layers = self.llm.num_hidden_layers
        return "" if self.all_layers in (None, layers) else f"{layers} of {self.all_layers} layers"

    @property
    def text_before(self) -> int:
        """Text tokens before the image."""
        return self.text_tokens // 4


def _vision(width: int, layers: int, side: int, patch: int) -> dict[str, Any]:
    """A CLIP of 64-wide heads and a 4x FFN."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "image_size": side,
        "patch_size": patch,
    }


HD: dict[str, Any] = {"family": "llava_hd", "settings": {"hd_fixed_grid": "2x2"}}
"""LLaVA-HD: an overview and 2x2 tiles, five views an image; as many tokens are retained as the overview has."""


def _cos(levels: list[int], **settings: Any) -> dict[str, Any]:
    """CoS with `cos_1296`, or the windows that `settings` give, on two feature levels."""
    settings = {"mm_projector_type": "cos_1296", **settings, "mm_vision_feature_levels": levels}
    return {"family": "cos", "settings": settings}


def _families(llava: BenchSize, hd: dict[str, Any], cos: dict[str, Any]) -> dict[str, BenchSize]:
    """One size of all families: the same language model; what differs from the LLaVA is given."""
    return {"llava": llava, "llava_hd": replace(llava, **HD, **hd), "cos": replace(llava, **cos)}


TINY = BenchSize(LlmSize(128, 256, 2, 4, 2, 512), _vision(64, 2, 32, 4), 2, 16, 8, 12, new_tokens=6, repeats=3)

CPU = BenchSize(
    LlmSize(1024, 3584, 4, 8, 2, 4008), _vision(256, 6, 336, 14), 2, 128, 100, 156, new_tokens=32, repeats=15
)
"""LLaMA-3-8B with every width divided by four. Four of its 32 layers: the vocabulary is cut so that lm_head keeps its
share of the whole (7%), and the encoder is in proportion too."""

GPU_8B = BenchSize(LLMS["llama-3-8b"], _vision(1024, 24, 336, 14), 4, 200, 100, 156, new_tokens=64, repeats=15)

PAPERS_HD: dict[str, Any] = {"batch": 1, "num_retained": 576, "num_skipped": 576}
PAPERS_COS: dict[str, Any] = {"num_retained": 272, "num_skipped": 256}
GPU_COS: dict[str, Any] = {**PAPERS_COS, **_cos([15, 22]), "batch": 2, "vision": _vision(1024, 24, 448, 14)}

SIZES: dict[str, dict[str, BenchSize]] = {
    "tiny": _families(
        TINY,
        {"num_retained": 64, "num_skipped": 64},
        {
            **_cos([0, 1], mm_projector_type="cos", cos_windows=[16, 4, 2], cos_queries=[4, 16, 64]),
            **{"vision": _vision(64, 3, 64, 4), "num_retained": 20, "num_skipped": 16},
        },
    ),
    "cpu": _families(
        CPU,
        {**PAPERS_HD, "repeats": 9},
        {**PAPERS_COS, **_cos([3, 4]), "vision": _vision(256, 6, 448, 14), "repeats": 9},
    ),
    "gpu-8b": _families(GPU_8B, PAPERS_HD, GPU_COS),
    "gpu-8b-4layers": _families(
        replace(GPU_8B, llm=LlmSize(4096, 14336, 4, 32, 8, 128256), all_layers=32), PAPERS_HD, GPU_COS
    ),
}
"""Size -> family -> what is run."""


def find_size(name: str, family: str) -> BenchSize:
    """Look a size and a family up by their exact names; `UserError` lists the known ones."""
    if name not in SIZES:
        raise UserError(f"--size: unknown size {name!r}; known: {', '.join(SIZES)}")
    if family not in SIZES[name]:
        raise UserError(f"--family: unknown family {family!r}; known: {', '.join(SIZES[name])}")
    return SIZES[name][family]


def resized(
    size: BenchSize,
    layers: int | None = None,
    batch: int | None = None,
    text_tokens: int | None = None,
    num_retained: int | None = None,
    num_skipped: int | None = None,
) -> BenchSize:
    """The size with what is given in place of its own; `UserError` for what cannot be."""
    whole = size.all_layers or size.llm.num_hidden_layers
    for flag, value, low in (
        ("--batch", batch, 1),
        ("--text-tokens", text_tokens, LEAST_TEXT),
        ("--num-retained", num_retained, 1),
        ("--num-skipped", num_skipped, 0),
    ):
        if value is not None and value < low:
            raise UserError(f"{flag} {value}: expected {low} or more")
    if layers is not None and not 1 <= layers <= whole:
        raise UserError(f"--layers {layers}: this size has {whole} decoder layers; take 1 to {whole} of them")
    given = {"batch": batch, "text_tokens": text_tokens, "num_retained": num_retained, "num_skipped": num_skipped}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if layers is not None:
        changed |= {"llm": replace(size.llm, num_hidden_layers=layers), "all_layers": whole}
    return replace(size, **changed)


def known_words(flag: str, text: str, known: Collection[str]) -> list[str]:
    """`"a,b"` -> ["a", "b"], each once; `UserError` lists the known ones."""
    words = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [word for word in words if word not in known] if words else [text]
    if unknown:
        raise UserError(f"{flag}: unknown {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return words


def dtype_name(name: str) -> str:
    """A precision's full name, by that or by LLaVA's short one (`bf16`); `UserError` lists the known ones."""
    if name not in DTYPE_NAMES:
        raise UserError(f"--dtype: unknown precision {name!r}; known: {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[name]


def find_dtype(name: str) -> Any:
    """The torch dtype that `dtype_name` names."""
    import torch

    return getattr(torch, dtype_name(name))
