"""LLaVA over transformers' Qwen3."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from llava_sv.model.config import LlavaFields
from llava_sv.model.language_model.causal_lm import LlavaCausalLM, LlavaDecoder
from llava_sv.model.language_model.skip_ffn import SkipFFNMixin


@strict
class LlavaQwen3Config(LlavaFields, Qwen3Config):
    """config.json of a LLaVA over Qwen3: Qwen3's fields and LLaVA's."""

    model_type = "llava_qwen3"


class SkipFFNQwen3DecoderLayer(SkipFFNMixin, Qwen3DecoderLayer):
    """transformers' Qwen3 decoder layer with Skip-FFN."""


class LlavaQwen3Model(LlavaDecoder, Qwen3Model):
    """transformers' Qwen3Model with Skip-FFN layers, a vision tower and a projector."""

    config_class = LlavaQwen3Config
    skip_layer_class = SkipFFNQwen3DecoderLayer


class LlavaQwen3ForCausalLM(LlavaCausalLM, Qwen3ForCausalLM):  # type: ignore[misc]
    """transformers' Qwen3ForCausalLM that takes images, skips, and forgets what it skipped."""

    config_class = LlavaQwen3Config
    decoder_class = LlavaQwen3Model
