"""Base checkpoints made on the spot in Hugging Face's layout: a CLIP, a LLaMA with its tokenizer."""

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
    PreTrainedTokenizerFast,
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


def make_llm(path: Path, pad_token: str | None = "<unk>") -> Path:
    """A LLaMA of 3 layers and a word-level fast tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pad_token:
        special["pad_token"] = pad_token
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path
