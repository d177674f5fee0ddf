"""Throw-away random bases and a handful of records, in the formats that training reads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SIDE, PATCH = 32, 8
PATCHES = (SIDE // PATCH) ** 2
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220), "white": (250, 250, 250)}

FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llava": ((), ("--sv_num_retained", "4", "--sv_num_skipped", "5")),
    "llava_hd": (("--mm_family", "llava_hd"), ("--sv_num_retained", "16", "--sv_num_skipped", "8")),
    "cos": (
        ("--mm_family", "cos", "--mm_projector_type", "cos_80", "--model_max_length", "512"),
        ("--sv_num_retained", "16", "--sv_num_skipped", "8"),
    ),
}
"""(Flags of each family, and those of its skipping) for the encoder made here."""

SKIPPING = {name: (*family, *budget) for name, (family, budget) in FAMILIES.items()}


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with LLaMA-3's markers, saved in `folder`."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(COLOURS), "What colour is it? user assistant"] * 4, vocab_size=300)
    bpe.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[4], pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_bases(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """(language model, vision tower) with random weights, in real Hugging Face format."""
    torch.manual_seed(seed)
    llm, clip = folder / "llm", folder / "clip"
    tokenizer = make_tokenizer(llm)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    ).save_pretrained(llm)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
        )
    ).save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(clip)
    return llm, clip


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def make_data(folder: Path, count: int = 16, seed: int = 0) -> Path:
    """`folder`/images, pretrain.json and sft.json: coloured squares, and every fourth SFT record without an image."""
    rng = random.Random(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    pretrain, sft = [], []
    for i in range(count):
        name = rng.choice(list(COLOURS))
        size = (rng.randint(20, 50), rng.randint(20, 50))
        Image.new("RGB", size, COLOURS[name]).save(images / f"{i}.png")
        pretrain.append({"id": f"p{i}", "image": f"{i}.png", "conversations": _turns("<image>", f"a {name} square")})
        if i % 4 == 3:
            sft.append(
                {"id": f"t{i}", "conversations": _turns(f"Say {name} {i} times.", " ".join([name] * (i % 5)) + ".")}
            )
        else:
            turns = _turns("<image>\nWhat colour is it?", name) + _turns("Sure?", "yes" if i % 2 else "yes, it is")
            sft.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    (folder / "pretrain.json").write_text(json.dumps(pretrain))
    (folder / "sft.json").write_text(json.dumps(sft))
    return folder


class World:
    """Bases and data in one folder, and the flags that train on them."""

    def __init__(self, folder: Path, count: int = 16) -> None:
        self.folder = folder
        self.llm, self.clip = make_bases(folder)
        self.data = make_data(folder / "data", count)

    def flags(self, stage: str, output: Path, *extra: str) -> list[str]:
        """A command line for `stage` (pretrain, sft or skip); `extra` flags come last and win."""
        flags = {
            "--model_name_or_path": self.llm,
            "--vision_tower": self.clip,
            "--version": "plain" if stage == "pretrain" else "llama_3",
            "--data_path": self.data / ("pretrain.json" if stage == "pretrain" else "sft.json"),
            "--image_folder": self.data / "images",
            "--output_dir": output,
            "--use_cpu": "True",
            "--num_train_epochs": "1",
            "--per_device_train_batch_size": "2",
            "--learning_rate": "1e-3",
            "--lr_scheduler_type": "cosine",
            "--warmup_steps": "0.03",
            "--model_max_length": "256",
            "--save_strategy": "no",
            "--report_to": "none",
            "--disable_tqdm": "True",
        }
        if stage == "pretrain":
            flags["--tune_mm_mlp_adapter"] = "True"
        if stage == "skip":
            flags |= {"--sv_num_retained": "4", "--sv_num_skipped": "5"}
        return [*(str(word) for pair in flags.items() for word in pair), *extra]
