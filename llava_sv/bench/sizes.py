"""What the benchmarks run: model sizes and batches by name. Read by `bench train` and `bench infer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_sv.bench.presets import LLMS, LlmSize
from llava_sv.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_NAMES: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", **{d: d for d in DTYPES}}


@dataclass(frozen=True)
class BenchSize:
    """A LLaVA of random weights, and the batch it is given."""

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

    @property
    def text_before(self) -> int:
        """Text tokens before the image."""
        return self.text_tokens // 4

    @property
    def dense_tokens(self) -> int:
        """Visual tokens of an image without skipping."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


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


SIZES: dict[str, BenchSize] = {
    "tiny": BenchSize(
        LlmSize(128, 256, 2, 4, 2, 512), _vision(64, 2, 32, 4), 2, 16, 8, 12, new_tokens=6, repeats=3
    ),
    # LLaMA-3-8B with every width divided by four. Four of its 32 layers: the vocabulary is cut so that lm_head keeps
    # its share of the whole (7%), and the encoder is in proportion too
    "cpu": BenchSize(
        LlmSize(1024, 3584, 4, 8, 2, 4008), _vision(256, 6, 336, 14), 2, 128, 100, 156, new_tokens=32, repeats=15
    ),
    "gpu-8b": BenchSize(
        LLMS["llama-3-8b"], _vision(1024, 24, 336, 14), 4, 200, 100, 156, new_tokens=64, repeats=15
    ),
    "gpu-8b-4layers": BenchSize(
        LlmSize(4096, 14336, 4, 32, 8, 128256), _vision(1024, 24, 336, 14), 4, 200, 100, 156, new_tokens=64, repeats=15
    ),
}  # fmt: skip


def find_size(name: str) -> BenchSize:
    """Look a size up by its exact name; `UserError` lists the known ones."""
    if name not in SIZES:
        raise UserError(f"--size: unknown size {name!r}; known: {', '.join(SIZES)}")
    return SIZES[name]


def find_dtype(name: str) -> Any:
    """A torch dtype by its name or LLaVA's short one (`bf16`); `UserError` lists the known ones."""
    import torch

    if name not in DTYPE_NAMES:
        raise UserError(f"--dtype: unknown precision {name!r}; known: {', '.join(DTYPE_NAMES)}")
    return getattr(torch, DTYPE_NAMES[name])
