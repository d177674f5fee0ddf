"""LLaVA over transformers' Mistral."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from llava_sv.model.config import LlavaFields
from llava_sv.model.language_model.causal_lm import LlavaCausalLM, LlavaDecoder
from llava_sv.model.language_model.skip_ffn import SkipFFNMixin


@strict
class LlavaMistralConfig(LlavaFields, MistralConfig):
    """config.json of a LLaVA over Mistral: Mistral's fields and LLaVA's."""

    model_type = "llava_mistral"


class SkipFFNMistralDecoderLayer(SkipFFNMixin, MistralDecoderLayer):
    """transformers' Mistral decoder layer with Skip-FFN."""


class LlavaMistralModel(LlavaDecoder, MistralModel):
    """transformers' MistralModel with Skip-FFN layers, a vision tower and a projector."""

    config_class = LlavaMistralConfig
    skip_layer_class = SkipFFNMistralDecoderLayer


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):  # type: ignore[misc]
    """transformers' MistralForCausalLM that takes images, skips, and forgets what it skipped."""

    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel
