"""Others' models of the same size and weights, to time ours against. Called by `bench train` and `bench infer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers import LlavaConfig as StockConfig

from llava_sv.bench.models import BenchBatch, share_weights
from llava_sv.bench.sizes import BenchSize
from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sv.model import LlavaLlamaForCausalLM

PEER = "transformers_llava"
"""What reports call it. Other families have no peer of the same sequence: LLaVA-NeXT's has a newline a row."""

LLM_PEER = "transformers_llama"
"""The other families' control: transformers' language model alone, on the sequence that our dense model spliced."""

IMAGE_ID_FROM_END = 1
"""transformers marks an image's places by an id of the vocabulary: here its last, which no batch uses in text."""


def has_peer(size: BenchSize) -> bool:
    """Whether transformers has the model of this family."""
    return size.family == "llava"


def _text_config(dense: LlavaLlamaForCausalLM) -> LlamaConfig:
    """The language model's part of our config."""
    known, apart = LlamaConfig().to_dict(), ("model_type", "architectures", "transformers_version")
    return LlamaConfig(**{k: v for k, v in dense.config.to_dict().items() if k in known and k not in apart})


def make_stock_llama(dense: LlavaLlamaForCausalLM) -> LlamaForCausalLM:
    """transformers' `LlamaForCausalLM` that holds the weights of our dense model's decoder and output layer."""
    parameter = next(dense.parameters())
    with torch.device(parameter.device):
        stock: Any = LlamaForCausalLM._from_config(
            _text_config(dense), dtype=parameter.dtype, attn_implementation="sdpa"
        )
    share_weights(stock, dict(dense.named_parameters()))
    return stock


def make_stock_llava(dense: LlavaLlamaForCausalLM) -> LlavaForConditionalGeneration:
    """transformers' `LlavaForConditionalGeneration` that holds the weights of our dense model."""
    ours = dense.config
    config = StockConfig(
        vision_config=CLIPVisionConfig.from_dict(ours.vision_config),
        text_config=_text_config(dense),
        image_token_index=ours.vocab_size - IMAGE_ID_FROM_END,
        vision_feature_layer=ours.mm_vision_select_layer,
        vision_feature_select_strategy="default",
    )
    parameter = next(dense.parameters())
    with torch.device(parameter.device):
        stock = LlavaForConditionalGeneration._from_config(config, dtype=parameter.dtype, attn_implementation="sdpa")
    wanted = {name for name, _ in stock.named_parameters()}
    renamed = {stock_name(key, wanted): value for key, value in dense.named_parameters()}
    # the encoder's last block and norm come after the selected hidden state: ours has them too
    share_weights(stock, renamed)
    stock.model.vision_tower.requires_grad_(False)
    return stock


def stock_name(key: str, wanted: set[str]) -> str:
    """A parameter's name in transformers' LLaVA."""
    key = key.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
    key = key.replace("model.mm_projector.0.", "model.multi_modal_projector.linear_1.")
    key = key.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
    if key.startswith(("model.layers", "model.norm", "model.embed_tokens")):
        key = key.replace("model.", "model.language_model.", 1)
    # transformers' CLIP inside LLaVA may hold its parts one level deeper
    if key not in wanted and key.startswith("model.vision_tower."):
        key = key.replace("model.vision_tower.", "model.vision_tower.vision_model.")
    return key


def stock_inputs(batch: BenchBatch, dense: LlavaLlamaForCausalLM) -> dict[str, Any]:
    """The batch as transformers' LLaVA wants it: each image mark becomes as many placeholder ids as it has tokens."""
    place = dense.config.vocab_size - IMAGE_ID_FROM_END
    dense_tokens = dense.config.dense_tokens_per_image()

    def spread(row: Tensor, marks: Tensor, fill: int) -> Tensor:
        return torch.cat(
            [row.new_full((dense_tokens,), fill) if mark else row[i : i + 1] for i, mark in enumerate(marks)]
        )

    marks = (batch.input_ids == IMAGE_TOKEN_INDEX).tolist()
    ids = torch.stack([spread(row, m, place) for row, m in zip(batch.input_ids, marks)])
    labels = torch.stack([spread(row, m, IGNORE_INDEX) for row, m in zip(batch.labels, marks)])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": batch.images,
    }
