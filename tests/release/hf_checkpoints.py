"""Random LLaVA and LLaVA-NeXT saved by transformers itself, with tokenizer and processor: what converting reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_sv.release import hf_processor
from tests.train.tiny import make_tokenizer

SIDE, PATCH = 32, 8
SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
)
TEXT: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VISION = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE, patch_size=PATCH
)
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
"""(height, width), as transformers has them."""

VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_hf(
    folder: Path,
    is_next: bool = False,
    text: str = "llama",
    vision: str = "clip",
    tied: bool = False,
    shards: str | None = None,
    pads: bool = False,
    seed: int = 0,
    image_token: bool = True,
    processor: dict[str, Any] | None = None,
    text_fields: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """`folder` with a model, tokenizer and processor. pads: the image processor makes pictures square by itself;
    fields: more of the config."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    kinds = dict(num_key_value_heads=4 if text == "llama" else 2)
    text_config = TEXT[text](
        vocab_size=len(tokenizer) + 3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tied,
        **{**SIZES, **kinds, **(text_fields or {})},
    )
    clip = vision == "clip"
    values: dict[str, Any] = {
        "vision_config": (CLIPVisionConfig if clip else SiglipVisionConfig)(**VISION),
        "text_config": text_config,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": "default" if clip else "full",
        "tie_word_embeddings": tied,
    }
    if is_next:
        values["image_grid_pinpoints"] = PINPOINTS
    else:
        values["image_seq_length"] = (SIDE // PATCH) ** 2
    values |= fields
    model_class: Any = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    model = model_class((LlavaNextConfig if is_next else LlavaConfig)(**values))
    with torch.no_grad():  # larger than fresh weights: answers then depend on the picture
        for name, value in model.named_parameters():
            if value.dim() > 1 and "embed" not in name:
                value.mul_(4)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    made: Any = LlavaNextProcessor if is_next else LlavaProcessor
    made(
        _image_processor(is_next, clip, pads, processor or {}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=values["vision_feature_select_strategy"],
        num_additional_image_tokens=int(clip),
        chat_template=VICUNA,
    ).save_pretrained(folder)
    return folder


def _image_processor(is_next: bool, clip: bool, pads: bool, more: dict[str, Any]) -> Any:
    square = {"height": SIDE, "width": SIDE}
    cropping = {"size": {"shortest_edge": SIDE}, "crop_size": square} if clip else {"size": square}
    if is_next:
        plain = {} if clip else {"do_center_crop": False, "crop_size": square}
        return LlavaNextImageProcessorPil(**{**cropping, **plain, "image_grid_pinpoints": PINPOINTS, **more})
    if pads:
        plain = {} if clip else {"do_center_crop": False, "crop_size": square}
        return LlavaImageProcessorPil(**{**cropping, **plain, "do_pad": True, **more})
    return (CLIPImageProcessorPil if clip else SiglipImageProcessorPil)(**{**cropping, **more})


def small_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and what it holds, weights and all."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(folder: Path, name: str, **values: Any) -> None:
    """Change fields of a JSON file; None takes a field away."""
    path = folder / name
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None or k not in values}))


def picture(width: int = 90, height: int = 41) -> Image.Image:
    """A real picture: noise over shades, not square."""
    rng = np.random.default_rng(7)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask_hf(folder: Path, prompt: str, image: Image.Image, new: int = 12) -> tuple[torch.Tensor, str]:
    """(logits [T, K], greedy text) as transformers' users ask."""
    is_next = json.loads((folder / "config.json").read_text())["model_type"] == "llava_next"
    kind: Any = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    model = kind.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = hf_processor.read_theirs(folder)
    given = processor(images=image, text=prompt, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**given).logits[0]
        tokens = model.generate(**given, max_new_tokens=new, do_sample=False)
    return logits, processor.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def ask_sv(folder: Path, prompt: str, image: Image.Image, new: int = 12) -> tuple[torch.Tensor, str]:
    """The same of this project's checkpoint, as its users ask."""
    from llava_sv.mm_utils import process_images, tokenizer_image_token
    from llava_sv.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(str(folder), device="cpu", device_map=None)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt").unsqueeze(0)
    given: dict[str, Any] = {
        "images": list(process_images([image], processor, model.config)),
        "image_sizes": [image.size],
    }
    with torch.inference_mode():
        logits = model(input_ids=ids, **given).logits[0]
        tokens = model.generate(ids, **given, max_new_tokens=new, do_sample=False)
    return logits, tokenizer.decode(tokens[0], skip_special_tokens=True)
