"""LLaVA over transformers' LLaMA (LLaMA 2 and 3, Vicuna)."""

from __future__ import annotations

from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava_sv.model.config import LlavaConfig
from llava_sv.model.language_model.causal_lm import LlavaCausalLM, LlavaDecoder
from llava_sv.model.language_model.skip_ffn import SkipFFNMixin


class SkipFFNDecoderLayer(SkipFFNMixin, LlamaDecoderLayer):
    """transformers' LLaMA decoder layer with Skip-FFN."""


class LlavaLlamaModel(LlavaDecoder, LlamaModel):
    """transformers' LlamaModel with Skip-FFN layers, a vision tower and a projector."""

    config_class = LlavaConfig
    skip_layer_class = SkipFFNDecoderLayer


class LlavaLlamaForCausalLM(LlavaCausalLM, LlamaForCausalLM):  # type: ignore[misc]
    """transformers' LlamaForCausalLM that takes images, skips, and forgets what it skipped."""

    config_class = LlavaConfig
    decoder_class = LlavaLlamaModel
