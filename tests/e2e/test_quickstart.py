"""The quickstart, whole: from data to report, with a seed of its own, held to the bars that the project promises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SEED = "7"


def quickstart(report: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("OMP_NUM_THREADS", "PRESET", "DATA", "OUTPUT", "HF_HUB_OFFLINE")
    }
    env |= {"SEED": SEED, "REPORT": str(report), "LLAVA_SV_NO_VENV": "1", "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh"), *arguments],
        env=env, capture_output=True, text=True, timeout=2400, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    report = tmp_path_factory.mktemp("quickstart")
    done = quickstart(report, "--fresh")
    yield report, done
    for folder in ("playground/data/toy", "checkpoints/tiny"):
        for path in ROOT.glob(f"{folder}-seed{SEED}*"):
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_report_reaches_the_bars(made):
    report, done = made
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((report / "report.json").read_text())
    assert result["seed"] == int(SEED)
    assert result["skip"]["accuracy"] >= 0.85
    assert result["dense"]["accuracy"] - result["skip"]["accuracy"] <= 0.03
    assert result["blind"]["accuracy"] <= 0.5
    assert result["flops_ratio"] <= 0.35
    assert result["kv_ratio"] < 1
    assert all(result[name]["train_seconds"] > 0 for name in ("dense", "skip"))
    assert set(result["chance"]["per_category"]) == {"existence", "colour", "shape", "count", "position", "text"}
    for name in ("report.png", "patches.png"):
        with Image.open(report / name) as image:
            image.verify()
    assert "llava-sv chat --model-path" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_call_has_nothing_left_to_do(made):
    report, _ = made
    started = time.monotonic()
    done = quickstart(report)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done before") == 9
    assert time.monotonic() - started < 120


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_model_answers_in_chat(made):
    report, done = made
    command = done.stdout.strip().splitlines()[-1].split()
    assert command[:2] == ["llava-sv", "chat"]
    row = json.loads((ROOT / f"playground/data/toy-seed{SEED}/bench.jsonl").read_text().splitlines()[0])
    chat = subprocess.run(
        [sys.executable, "-m", "llava_sv.cli", *command[1:], "--prompt", row["question"]],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip() in row["choices"]
    answered = [json.loads(line) for line in (report / f"seed{SEED}/skip.answers.jsonl").read_text().splitlines()]
    assert chat.stdout.strip() == next(a["text"] for a in answered if a["question_id"] == row["id"])
