"""LLaVA over transformers' Qwen2 (Qwen 1.5, 2 and 2.5)."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from llava_sv.model.config import LlavaFields
from llava_sv.model.language_model.causal_lm import LlavaCausalLM, LlavaDecoder
from llava_sv.model.language_model.skip_ffn import SkipFFNMixin


@strict
class LlavaQwen2Config(LlavaFields, Qwen2Config):
    """config.json of a LLaVA over Qwen2: Qwen2's fields and LLaVA's."""

    model_type = "llava_qwen2"


class SkipFFNQwen2DecoderLayer(SkipFFNMixin, Qwen2DecoderLayer):
    """transformers' Qwen2 decoder layer with Skip-FFN."""


class LlavaQwen2Model(LlavaDecoder, Qwen2Model):
    """transformers' Qwen2Model with Skip-FFN layers, a vision tower and a projector."""

    config_class = LlavaQwen2Config
    skip_layer_class = SkipFFNQwen2DecoderLayer


class LlavaQwen2ForCausalLM(LlavaCausalLM, Qwen2ForCausalLM):  # type: ignore[misc]
    """transformers' Qwen2ForCausalLM that takes images, skips, and forgets what it skipped."""

    config_class = LlavaQwen2Config
    decoder_class = LlavaQwen2Model
