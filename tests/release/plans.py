"""For the tests of converting: a plan written in this project's layout, and what its checkpoint answers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from llava_sv.mm_utils import process_images
from llava_sv.model.builder import load_pretrained_model
from llava_sv.release.plan import Plan
from llava_sv.release.weights import write_weights

SIZES = ((70, 64), (40, 30), (100, 40))


def write_sv(plan: Plan, folder: Path) -> Path:
    """This project's layout, as plain as it gets."""
    folder.mkdir()
    write_weights(folder, plan.entries)
    (folder / "config.json").write_text(json.dumps(plan.config))
    plan.tokenizer.save_pretrained(folder)
    plan.image_processor.save_pretrained(folder)
    return folder


def logits(folder: Path, **options) -> list[torch.Tensor]:
    """Of a prompt with each of a few pictures."""
    _, model, processor, _ = load_pretrained_model(str(folder), device="cpu", **options)
    found = []
    for size in SIZES:
        torch.manual_seed(0)
        pixels = torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8).numpy()
        views = process_images([Image.fromarray(pixels)], processor, model.config)
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([[1, -200, 7, 8]]), images=views, image_sizes=[size]).logits)
    return found


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """To the last bit."""
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
