"""The processor's side of transformers' Auto classes: registered when the package is imported, beside its models."""

from transformers import AutoProcessor

from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.processing import LlavaSvProcessor

for _decoder in DECODERS.values():
    AutoProcessor.register(_decoder.config, LlavaSvProcessor, exist_ok=True)
