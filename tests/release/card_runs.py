"""A tiny run with everything that a model card is made from: trained on a mixture, evaluated, timed. Used by the card's
tests, which copy it before they change it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava_sv import cli
from llava_sv.data import toy
from llava_sv.eval import timing
from llava_sv.release.card import CardOptions
from llava_sv.train.train import train
from tests.checkpoints import save_checkpoint
from tests.data.mix_samples import recipe, run
from tests.train.tiny import World

CARD_FILE = """license: apache-2.0
authors: [A. Person, B. Person]
base_licenses: {llm: llama3 licence}
intended_use: Tests of a model card.
notes: Made in a test.
languages: [en]
"""

HUB = "https://huggingface.co/datasets/someone/squares"


@dataclass(frozen=True)
class Sources:
    """Where everything lies, below one folder."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "out"

    @property
    def pretrain(self) -> Path:
        return self.root / "pre"

    @property
    def manifest(self) -> Path:
        return self.root / "mixtures" / "squares" / "manifest.json"

    def __getattr__(self, name: str) -> Path:
        """skip, dense, timing, infer, train: reports."""
        return self.root / f"{name}.json"

    def options(self, **more) -> CardOptions:
        given = {
            "name": "tiny",
            "eval_reports": [self.skip],
            "dense_reports": [self.dense],
            "speed_reports": [self.timing, self.infer, self.train],
            "data_manifest": self.manifest,
            "card_file": self.root / "card.yaml",
            "pretrain_run": self.pretrain,
        }
        return CardOptions(**{**given, **more})

    def copy(self, folder: Path) -> Sources:
        return Sources(Path(shutil.copytree(self.root, folder / "copy")))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The current folder is `folder` for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_sources(root: Path) -> Sources:
    """Train (pretraining, then four steps of skipping), evaluate, time; write the rest."""
    made, world = Sources(root), World(root)
    shared = {"converter": "llava_json", "images": "data/images"}
    squares = {**shared, "name": "squares", "annotations": "data/sft.json", "licence": "CC0", "home": HUB}
    captions = {**shared, "name": "captions", "annotations": "data/pretrain.json", "contaminates": ["docvqa", "mme"]}
    mixture = run(recipe(root / "squares.yaml", squares, captions, stage="sft", seed=3), root)
    train(argv=world.flags("pretrain", made.pretrain, "--max_steps", "2"))
    projector = ("--pretrain_mm_mlp_adapter", str(made.pretrain / "mm_projector.bin"))
    data = ("--data_path", str(mixture), "--image_folder", str(root), "--max_steps", "4")
    train(argv=world.flags("skip", made.checkpoint, *projector, *data))
    dense = save_checkpoint(root / "tiny-dense", None)
    bench = root / "bench"
    assert toy.main(["--output", str(bench), "--train", "2", "--bench", "12", "--fine-bench", "4"]) == 0
    for folder, report in ((made.checkpoint, made.skip), (dense, made.dense)):
        asked = ("--task", "toy", "--data-path", str(bench), "--json", str(report), "--device", "cpu")
        assert cli.main(["eval", "--model-path", str(folder), "--max-new-tokens", "3", *asked]) == 0
    pair = ["--dense", str(dense), "--skip", str(made.checkpoint), "--data-path", str(bench)]
    with inside(root):
        timing.main([*pair, "--samples", "1", "--repeats", "1", "--json", str(made.timing)])
    for name, report in BENCH.items():
        (root / f"{name}.json").write_text(json.dumps(report))
    (root / "card.yaml").write_text(CARD_FILE)
    return made


def side(scale: float) -> dict:
    """What `bench` measures of one contender, as far as a card shows it."""
    return {
        "prefill_ms": 40 * scale,
        "decode_ms_per_token": 3 * scale,
        "end_to_end_ms": 230 * scale,
        "step_ms": 500 * scale,
        "kv_bytes": int(2**21 * scale),
        "peak_bytes": int(2**30 * scale),
    }


def saved(share: float) -> dict:
    """What `bench` says of one region."""
    return {"time_saved": share, "time_saved_quartiles": [share - 0.01, share + 0.01], "flops_saved": 0.7}


HEAD = {
    "size": "cpu",
    "family": "llava",
    "settings": {"num_retained": 4, "num_skipped": 5, "batch": 1},
    "environment": {"device": "a test's CPU", "torch": "2.13"},
}
SIDES = {"dense": side(1.0), "skip": side(0.5)}
BENCH = {
    "infer": {
        **HEAD,
        **SIDES,
        "new_tokens": 64,
        "regions": {"prefill": saved(0.31), "decode": saved(0.12), "end_to_end": saved(0.22)},
    },
    "train": {**HEAD, "regions": {"llm": {**SIDES, **saved(0.41)}, "model": {**SIDES, **saved(0.37)}}},
}
"""Reports in the shape of `llava-sv bench infer|train --json`; a slow test makes real ones."""


def section(text: str, title: str) -> str:
    """The text under `## title`."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def row(text: str, name: str) -> list[str]:
    """Cells of the first table row that begins with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def change(path: Path, *keys, value) -> None:
    """Set one value of a JSON file; keys lead to it."""
    values = json.loads(path.read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    assert inner[keys[-1]] != value
    inner[keys[-1]] = value
    path.write_text(json.dumps(values))
