"""Small checkpoints with random weights, saved as training saves them, for tests that need something to ask."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from llava_sv.model.builders import build_model
from tests.train.tiny import make_bases

SKIP = {"num_retained": 4, "num_skipped": 5}


def save_checkpoint(folder: Path, skip_vision: dict | None, seed: int = 0, train_seconds: float = 10.0) -> Path:
    """A LLaVA over `tests.train.tiny`'s bases in `folder`; weights large enough that answers depend on the image."""
    llm, clip = make_bases(folder.parent / f"{folder.name}-bases", seed)
    torch.manual_seed(seed)
    tokenizer, model, image_processor = build_model(
        "llava", llm=str(llm), vision_tower=str(clip), skip_vision=skip_vision, conv_template="llama_3"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
    (folder / "train_summary.json").write_text(json.dumps({"train_seconds": train_seconds, "steps": 1, "samples": 2}))
    return folder


if __name__ == "__main__":  # scripts/check_package.sh: `python -m tests.checkpoints FOLDER`
    save_checkpoint(Path(sys.argv[1]), SKIP)
