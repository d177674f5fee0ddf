"""The models that are timed: one set of random weights, held by a dense LLaVA and a skipping one, and their batch.

Called by `bench train` and `bench infer`. B batch, T0 prompt length, T spliced length, C width; views: of one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from llava_sv.bench.checkpoint import views_of
from llava_sv.bench.sizes import BenchSize
from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sv.model import LlavaConfig, LlavaLlamaForCausalLM


@dataclass
class BenchBatch:
    """input_ids, labels [B, T0] with one image mark a row, no padding; images [B, 3, H, W] or [B, views, 3, H, W]."""

    input_ids: Tensor
    labels: Tensor
    images: Tensor


def make_config(size: BenchSize, skip_vision: dict[str, Any] | None, new_tokens: int = 0) -> LlavaConfig:
    """The config of a model of this size and family; dense where `skip_vision` is None. It has as many positions as the
    dense sequence and an answer of `new_tokens` take."""
    settings: dict[str, Any] = dict(
        **asdict(size.llm),
        max_position_embeddings=4096,
        rope_theta=500000.0,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        mm_family=size.family,
        mm_vision_tower="random",
        vision_config=CLIPVisionConfig(**size.vision).to_dict(),
        mm_hidden_size=size.vision["hidden_size"],
        skip_vision=skip_vision,
        attn_implementation="sdpa",
        **size.settings,
    )
    config = LlavaConfig(**settings)
    needed = size.text_tokens + config.dense_tokens_per_image() + new_tokens
    config.max_position_embeddings = max(config.max_position_embeddings, needed)
    return config


def make_model(config: LlavaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlavaLlamaForCausalLM:
    """Random weights, made on the device in the precision wanted."""
    torch.manual_seed(seed)
    with torch.device(device):
        return LlavaLlamaForCausalLM._from_config(config, dtype=dtype)


def share_weights(target: torch.nn.Module, weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """Let `target` hold the very parameters of `weights`, gradients too: drop those between uses."""
    own = {name for name, _ in target.named_parameters()}
    absent = own - set(weights)
    target.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False, assign=True)
    if any("summary" not in name for name in absent):
        raise ValueError(f"no weights to share for {sorted(absent)[:3]}")
    return target


def skip_block(size: BenchSize) -> dict[str, Any]:
    """The `skip_vision` block of the skipping model."""
    return {"num_retained": size.num_retained, "num_skipped": size.num_skipped}


def freeze_encoder(model: Any, family: str) -> Any:
    """What the family's recipe trains: all but the encoder, and for CoS what features depend on. Returns `model`."""
    tower = model.get_model().vision_tower
    tower.requires_grad_(False)
    if family == "cos":
        for parameter, _ in tower.used_parameters().values():
            parameter.requires_grad_(True)
    return model


def make_pair(
    size: BenchSize, device: torch.device, dtype: torch.dtype, new_tokens: int = 0
) -> tuple[LlavaLlamaForCausalLM, LlavaLlamaForCausalLM]:
    """(dense, skip): the same weights in both, the skipping one with its summaries beside them.

    Encoders are frozen, but for CoS', whose recipe trains what features depend on.
    """
    dense = make_model(make_config(size, None, new_tokens), device, dtype)
    skip = make_model(make_config(size, skip_block(size), new_tokens), device, dtype)
    share_weights(skip, dict(dense.named_parameters()))
    for model in (dense, skip):
        freeze_encoder(model, size.family)
    return dense, skip


def make_batch(size: BenchSize, device: torch.device, dtype: torch.dtype, seed: int = 1) -> BenchBatch:
    """Random text with an image in its first quarter; the second half of the text is supervised."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, size.llm.vocab_size - 1, (size.batch, size.text_tokens), generator=generator)
    mark = torch.full((size.batch, 1), IMAGE_TOKEN_INDEX)
    input_ids = torch.cat([text[:, : size.text_before], mark, text[:, size.text_before :]], dim=1)
    labels = input_ids.clone()
    labels[:, : 1 + size.text_tokens // 2] = IGNORE_INDEX
    side, views = size.vision["image_size"], views_of(make_config(size, None))
    shape = (size.batch, views, 3, side, side) if views > 1 else (size.batch, 3, side, side)
    images = torch.randn(shape, generator=generator)
    return BenchBatch(input_ids.to(device), labels.to(device), images.to(device, dtype))
