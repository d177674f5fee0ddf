"""Two processes on this machine for tests: jobs for `zero_worker`, and records that no two ranks batch alike."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

from tests.train import runs
from tests.train.tiny import COLOURS

WORKER = Path(__file__).with_name("zero_worker.py")


def mixed_records(folder: Path, count: int = 16, seed: int = 3) -> Path:
    """A data file of `count` records: texts, and pictures of 1 to 5 tiles. Every other record is a text."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        colour = rng.choice(list(COLOURS))
        turns = [
            {"from": "human", "value": f"Number {i}: what colour? " + "really " * rng.randint(0, 4)},
            {"from": "gpt", "value": " ".join([colour] * rng.randint(1, 4))},
        ]
        record: dict = {"id": str(i), "conversations": turns}
        if i % 2:
            side = rng.choice([(30, 30), (64, 32), (64, 64), (32, 96)])
            Image.new("RGB", side, COLOURS[colour]).save(folder / "images" / f"m{i}.png")
            record["image"] = f"m{i}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append(record)
    path = folder / "mixed.json"
    path.write_text(json.dumps(records))
    return path


def run_jobs(folder: Path, jobs: list[dict], ranks: int = 2, timeout: float = 240) -> dict[str, list[dict]]:
    """Each job's results, one from each rank. Fails with what was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"folder": str(folder), "jobs": jobs}))
    done = runs.launch([*runs.TORCHRUN, ranks, WORKER, plan], timeout, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {
        job["name"]: [json.loads((folder / f"{job['name']}.{rank}.json").read_text()) for rank in range(ranks)]
        for job in jobs
    }
