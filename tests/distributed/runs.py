"""The real training scripts on random tiny bases and sixteen records, and what came out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.distributed.nodes import KEPT
from tests.train.runs import ROOT

SCRIPT = "scripts/v1_5/finetune_skip.sh"
FLAGS = ("--max_steps", "2", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True")


def settings(world, output: Path, **more: str) -> dict[str, str]:
    """The variables of a small run on CPU: a batch of 4 in all."""
    return {
        "PRESET": "tiny",
        "LLM": str(world.llm),
        "VISION_TOWER": str(world.clip),
        "DATA": str(world.data / "sft.json"),
        "IMAGE_FOLDER": str(world.data / "images"),
        "ADAPTER": str(world.projector),
        "OUTPUT": str(output),
        "NPROC": "2",
        "BATCH": "4",
        "PER_DEVICE_BATCH": "2",
        "NUM_RETAINED": "4",
        "NUM_SKIPPED": "5",
        "MAX_LENGTH": "256",
        "JOIN_TIMEOUT": "120",
        **more,
    }


def run_script(world, output: Path, *flags: str, **more: str) -> subprocess.CompletedProcess:
    """The script on this machine, with a clean environment."""
    clean = {name: os.environ[name] for name in KEPT if name in os.environ}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings(world, output, **more)
    return subprocess.run(
        ["bash", SCRIPT, *FLAGS, *flags], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300
    )
