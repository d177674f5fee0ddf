"""The model. Importing this registers `LlavaConfig` and `LlavaLlamaForCausalLM` with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llava_sv.model.config import LlavaConfig, SkipVisionConfig
from llava_sv.model.language_model.llava_llama import LlavaLlamaForCausalLM, LlavaLlamaModel

AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
# transformers has a LlavaConfig of its own; the registry is keyed by class, so `exist_ok` shadows nothing
AutoModel.register(LlavaConfig, LlavaLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)

__all__ = ["LlavaConfig", "LlavaLlamaForCausalLM", "LlavaLlamaModel", "SkipVisionConfig"]
