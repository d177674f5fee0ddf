"""The model. Importing this registers every decoder's config and model with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from llava_sv.model.config import LlavaConfig, SkipVisionConfig
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.model.language_model.llava_llama import LlavaLlamaForCausalLM, LlavaLlamaModel

for _decoder in DECODERS.values():
    AutoConfig.register(_decoder.model_type, _decoder.config)
    # transformers has a LlavaConfig of its own; the registry is keyed by class, so `exist_ok` shadows nothing
    AutoModel.register(_decoder.config, _decoder.model.decoder_class, exist_ok=True)
    AutoModelForCausalLM.register(_decoder.config, _decoder.model, exist_ok=True)
    AutoModelForImageTextToText.register(_decoder.config, _decoder.model, exist_ok=True)

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM", "LlavaLlamaModel", "SkipVisionConfig"]
