"""Which language models a LLaVA can be built over: the one place where another is added.

Read by `loading` and the builders, and to register every model with transformers' Auto classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_sv.model.config import LlavaConfig, LlavaFields
from llava_sv.model.language_model.causal_lm import LlavaCausalLM
from llava_sv.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava_sv.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava_sv.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava_sv.model.language_model.llava_qwen3 import LlavaQwen3Config, LlavaQwen3ForCausalLM


@dataclass(frozen=True)
class Decoder:
    """A LLaVA over one kind of language model."""

    config: type[LlavaFields]
    model: type[LlavaCausalLM]
    also: tuple[str, ...] = ()
    """Other `model_type`s of LLaVA's own checkpoints that are read as this one."""

    @property
    def model_type(self) -> str:
        """In config.json of the checkpoints that are written."""
        return self.config.model_type


DECODERS: dict[str, Decoder] = {
    "llama": Decoder(LlavaConfig, LlavaLlamaForCausalLM, also=("llava",)),
    "mistral": Decoder(LlavaMistralConfig, LlavaMistralForCausalLM),
    "qwen2": Decoder(LlavaQwen2Config, LlavaQwen2ForCausalLM, also=("llava_qwen",)),
    "qwen3": Decoder(LlavaQwen3Config, LlavaQwen3ForCausalLM),
}
"""`model_type` of a language model -> the LLaVA over it."""

BY_MODEL_TYPE: dict[str, Decoder] = {
    name: decoder for decoder in DECODERS.values() for name in (decoder.model_type, *decoder.also)
}
"""`model_type` of a LLaVA checkpoint -> how it is read."""


def model_class(config: Any) -> type[LlavaCausalLM]:
    """The model that a LLaVA's config (an instance of one of `DECODERS`' classes) describes."""
    return BY_MODEL_TYPE[config.model_type].model
