"""Make the tiny base models from nothing: `llm/` (LLaMA and tokenizer) and `clip/`, in Hugging Face format.

What arrives are a seed and numbers of steps; what leaves are the two folders and the figures of each base alone.
Run by hand, once: the folders are committed. On two cores, both at a time:

    OMP_NUM_THREADS=1 python playground/tiny/make_bases.py llm &
    OMP_NUM_THREADS=1 python playground/tiny/make_bases.py clip
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_tokenizer import make_tokenizer
from train_clip import MEAN, SIZE, STD, train_clip
from train_llm import train_llm
from transformers import CLIPModel, GenerationConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

HERE = Path(__file__).resolve().parent


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save weights rounded to bfloat16 (half the size), with a config that says float32, in which they are loaded."""
    scratch = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    rounded = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    model.save_pretrained(scratch, state_dict=rounded)
    config = json.loads((scratch / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps(_as_float32(config), indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in scratch.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    shutil.rmtree(scratch)


def _as_float32(config: dict) -> dict:
    """The config with every `dtype` in it, nested ones too, set to float32."""
    nested = {key: _as_float32(value) if isinstance(value, dict) else value for key, value in config.items()}
    return nested | ({"dtype": "float32"} if "dtype" in config else {})


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it under the class name that every transformers 5 knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_llm_folder(folder: Path, steps: int, seed: int, go_on: bool = False) -> None:
    """Train the LLM and write model, tokenizer and generation config."""
    model = LlamaForCausalLM.from_pretrained(folder) if go_on else None
    tokenizer = make_tokenizer()
    _save_tokenizer(tokenizer, folder)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end_of_text|>")]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
    ).save_pretrained(folder)

    def save(model: PreTrainedModel) -> None:
        model.generation_config = GenerationConfig.from_pretrained(folder)
        save_model(model, folder)

    train_llm(tokenizer, steps, seed, save, model)


def make_clip_folder(folder: Path, steps: int, seed: int, go_on: bool = False) -> None:
    """Train the encoder and write model and image processor; its text tower reads with the LLM's tokenizer."""
    model = CLIPModel.from_pretrained(folder) if go_on else None
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)
    tokenizer = make_tokenizer()
    train_clip(tokenizer, steps, seed, lambda trained: save_model(trained, folder), model)


BASES: dict[str, tuple[Callable[[Path, int, int, bool], None], int]] = {
    "llm": (make_llm_folder, 7000),
    "clip": (make_clip_folder, 3000),
}
"""Each base: who makes it, and in how many steps if not told otherwise."""


def main() -> None:
    """Read the command line and make one base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 7000 for llm, 3000 for clip)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write llm/ or clip/ under")
    parser.add_argument("--go-on", action="store_true", help="start from the base that is there, with a new schedule")
    args = parser.parse_args()
    make, steps = BASES[args.base]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    make(args.output / args.base, args.steps or steps, args.seed, args.go_on)


if __name__ == "__main__":
    main()
