"""The three families side by side, trained by their own scripts on less data: the report, and fine detail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SEED = "7"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    report = tmp_path_factory.mktemp("families")
    dropped = ("OMP_NUM_THREADS", "PRESET", "DATA", "OUTPUT", "HF_HUB_OFFLINE")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {"SEED": SEED, "REPORT": str(report), "LLAVA_SV_NO_VENV": "1", "PYTHON": sys.executable}
    env |= {"TOY_TRAIN": "1500", "TOY_BENCH": "60", "EPOCHS": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/families.sh"), "--fresh"],
        env=env, capture_output=True, text=True, timeout=2400, check=False,
    )  # fmt: skip
    yield report, done
    for path in (f"playground/data/toy-fine-seed{SEED}", f"checkpoints/tiny-families-seed{SEED}"):
        shutil.rmtree(ROOT / path, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_more_pixels_show_more_detail(made):
    """LLaVA-HD or CoS, skipping, beats dense LLaVA by 10 points and more on small words and shapes."""
    report, done = made
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((report / "report.json").read_text())
    assert set(result["models"]) == {"llava-dense", "llava-skip", "hd-skip", "cos-skip"}
    assert [result["models"][name]["family"] for name in ("llava-skip", "hd-skip", "cos-skip")] == [
        "llava",
        "llava_hd",
        "cos",
    ]
    fine = result["fine_detail"]
    assert fine["baseline"]["name"] == "llava-dense"
    assert fine["best"]["name"] in ("hd-skip", "cos-skip")
    assert fine["gain_points"] >= 10
    text = (report / "report.md").read_text()
    assert fine["best"]["name"] in text
    assert "llava-dense" in text
    with Image.open(report / "report.png") as image:
        image.verify()
