"""Base checkpoints made on the spot in Hugging Face's layout: a CLIP, a SigLIP, language models with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

WORDS = ["<s>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "is", "there", "yes", "no"]
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def make_clip(path: Path, whole: bool = True) -> Path:
    """A CLIP of 4 x 4 patches; `whole` has both halves, as published checkpoints do."""
    torch.manual_seed(0)
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    if whole:
        config = CLIPConfig(
            text_config=CLIPTextConfig(**text).to_dict(),
            vision_config=CLIPVisionConfig(**vision).to_dict(),
            projection_dim=8,
        )
        CLIPModel(config).save_pretrained(path)
    else:
        from transformers import CLIPVisionModel

        CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return path


SIGLIP_PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 32, "width": 32},
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def make_siglip(path: Path, whole: bool = True, **vision) -> Path:
    """A SigLIP of 4 x 4 patches with both halves, or its vision part; SigLIP 2 of fixed size has the same layout."""
    torch.manual_seed(2)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    config = SiglipVisionConfig(**{**sizes, "image_size": 32, "patch_size": 8, **vision})
    if whole:
        text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
        text = SiglipTextConfig(**text, max_position_embeddings=8)
        SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=config.to_dict())).save_pretrained(path)
    else:
        SiglipVisionModel(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(SIGLIP_PREPROCESSOR))
    return path


LLMS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def make_llm(path: Path, pad_token: str | None = "<unk>", kind: str = "llama") -> Path:
    """A language model of 3 layers and a word-level fast tokenizer."""
    torch.manual_seed(1)
    config_class, model_class, own = LLMS[kind]
    config = config_class(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=256,
        **own,
    )
    model_class(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pad_token:
        special["pad_token"] = pad_token
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path
