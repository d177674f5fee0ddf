"""Checkpoints in LLaVA's own layouts, tiny and random: the files, keys and config.json fields of `liuhaotian/...`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tests.model.checkpoints import make_clip

WIDTH, ENCODER_WIDTH, SIDE, VOCABULARY = 48, 32, 32, 64
CORPUS = ["USER: is there a red circle? ASSISTANT: yes", "a blue square is there", "no, there is none", "what is it"]

V15 = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": ENCODER_WIDTH,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float32",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": VOCABULARY,
}
"""config.json of liuhaotian/llava-v1.5-7b, with sizes of its own."""

V16 = {name: value for name, value in V15.items() if name != "max_length"} | {
    "_name_or_path": "./checkpoints/vicuna-7b-v1-5",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava_llama",
    "rope_theta": 10000.0,
    "tokenizer_model_max_length": 4096,
    "transformers_version": "4.36.2",
    "unfreeze_mm_vision_tower": True,
}
"""Of liuhaotian/llava-v1.6-vicuna-7b."""

V16_MISTRAL = V16 | {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["LlavaMistralForCausalLM"],
    "max_position_embeddings": 32768,
    "model_type": "llava_mistral",
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "transformers_version": "4.37.2",
}
"""Of liuhaotian/llava-v1.6-mistral-7b."""

TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False},
    "clean_up_tokenization_spaces": False,
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False},
    "legacy": False,
    "model_max_length": 2048,
    "pad_token": None,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "lstrip": False, "normalized": False, "rstrip": False},
}


def make_tokenizer(folder: Path) -> None:
    """The slow tokenizer's files alone: a sentencepiece model and two JSON files."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    tokens = {name: TOKENIZER_CONFIG[name]["content"] for name in ("bos_token", "eos_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps({**tokens, "pad_token": "<unk>"}))


def language_weights(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """A random language model of these sizes, by LLaMA's names."""
    torch.manual_seed(seed)
    mistral = config["model_type"] == "llava_mistral"
    kind, of = (MistralForCausalLM, MistralConfig) if mistral else (LlamaForCausalLM, LlamaConfig)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = kind(of(**{name: config[name] for name in (*sizes, "num_key_value_heads")}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def projector_weights(seed: int = 1) -> dict[str, Tensor]:
    """`mlp2x_gelu`."""
    torch.manual_seed(seed)
    shapes = {"0.weight": (WIDTH, ENCODER_WIDTH), "0.bias": (WIDTH,), "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}
    return {f"model.mm_projector.{name}": torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def encoder_weights(clip: Path) -> dict[str, Tensor]:
    """The encoder of v1.6's checkpoints: that of `clip`, trained further."""
    names = load_file(clip / "model.safetensors")
    kept = {name.removeprefix("vision_model."): value for name, value in names.items() if is_vision(name)}
    return {f"model.vision_tower.vision_tower.vision_model.{name}": value * 1.25 for name, value in kept.items()}


def is_vision(name: str) -> bool:
    """Whether a key of a whole CLIP is its vision model's."""
    return not name.startswith(("text_", "visual_projection", "logit_scale"))


def shard(folder: Path, weights: dict[str, Tensor], kind: str) -> None:
    """Two shards and their index, pickled or safetensors, as transformers 4 wrote them."""
    stem, end = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    names = list(weights)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    files = {i: f"{stem}-{i:05d}-of-00002.{end}" for i in halves}
    for i, half in halves.items():
        part = {name: weights[name].contiguous() for name in half}
        if kind == "bin":
            torch.save(part, folder / files[i])
        else:
            save_file(part, folder / files[i], {"format": "pt"})
    total = sum(value.numel() * value.element_size() for value in weights.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: files[i] for i, half in halves.items() for name in half},
    }
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def make_v15(folder: Path, clip: Path, left_over: bool = True, **changes) -> dict[str, Tensor]:
    """A checkpoint like liuhaotian/llava-v1.5-7b in `folder`, whose config.json names the encoder `clip`.

    left_over: with the buffers that transformers 4.31 and older wrote. Returns its weights.
    """
    folder.mkdir(parents=True)
    config = V15 | {"mm_vision_tower": str(clip)} | changes
    weights = language_weights(config) | projector_weights()
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)} if left_over else {}
    shard(folder, weights | buffers, "bin")
    _rest(folder, config)
    return weights


def make_v16(folder: Path, clip: Path, base: dict = V16, **changes) -> dict[str, Tensor]:
    """A checkpoint like liuhaotian/llava-v1.6-*: safetensors with a trained encoder and the newline."""
    folder.mkdir(parents=True)
    config = base | {"mm_vision_tower": str(clip)} | changes
    torch.manual_seed(5)
    weights = {"model.image_newline": torch.randn(WIDTH)}
    weights |= language_weights(config) | projector_weights() | encoder_weights(clip)
    shard(folder, weights, "safetensors")
    _rest(folder, config)
    return weights


def _rest(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    make_tokenizer(folder)


def make_encoder(folder: Path) -> Path:
    """The CLIP that both name."""
    return make_clip(folder)


def make_base(folder: Path, seed: int = 0) -> Path:
    """A language model alone, with the slow tokenizer: what LLaVA calls its base (lmsys/vicuna-7b-v1.5)."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = LlamaForCausalLM(LlamaConfig(**{name: V15[name] for name in (*sizes, "num_key_value_heads")}))
    model.load_state_dict(language_weights(V15, seed))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_projector(folder: Path, clip: Path, kind: str = "bin") -> dict[str, Tensor]:
    """What LLaVA's pretraining leaves: config.json and mm_projector.bin."""
    folder.mkdir(parents=True)
    changes = {"tune_mm_mlp_adapter": True, "mm_vision_tower": str(clip), "_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (folder / "config.json").write_text(json.dumps(V15 | changes))
    weights = projector_weights()
    torch.save(weights, folder / "mm_projector.bin")
    return weights


def make_lora(folder: Path, clip: Path, base: str, kind: str = "bin") -> dict[str, Tensor]:
    """What LLaVA's LoRA training leaves, on the attention's q and v. Returns the adapters and the projector."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(V15 | {"mm_vision_tower": str(clip), "model_type": "llava_llama"}))
    settings = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "revision": None,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(7)
    adapters = {}
    for layer in range(V15["num_hidden_layers"]):
        for name in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            adapters[f"{stem}.lora_A.weight"] = torch.randn(4, WIDTH) * 0.3
            adapters[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, 4) * 0.3
    others = {f"base_model.model.{name}": value for name, value in projector_weights().items()}
    torch.save(others, folder / "non_lora_trainables.bin")
    if kind == "bin":
        torch.save(adapters, folder / "adapter_model.bin")
    else:
        save_file(adapters, folder / "adapter_model.safetensors", {"format": "pt"})
    return adapters | others
