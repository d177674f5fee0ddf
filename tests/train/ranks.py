"""Two processes on this machine for tests: jobs for `zero_worker`, and records that no two ranks batch alike."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.train.tiny import COLOURS

WORKER = Path(__file__).with_name("zero_worker.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")

FAMILIES = {
    "llava": ("--sv_num_retained", "4", "--sv_num_skipped", "5"),
    "llava_hd": ("--mm_family", "llava_hd", "--sv_num_retained", "16", "--sv_num_skipped", "8"),
    "cos": (
        *("--mm_family", "cos", "--mm_projector_type", "cos_80", "--sv_num_retained", "16"),
        *("--sv_num_skipped", "8", "--model_max_length", "512"),
    ),
}
"""Flags of each family for the 32-pixel encoder of `tiny`, with skipping on."""


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


def environment() -> dict[str, str]:
    """This one without what a launcher sets."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    root = str(WORKER.parents[2])
    path = os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


def launch(command: list[str], timeout: float, extra: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run to the end, or kill the whole group of processes: `subprocess.TimeoutExpired`."""
    with subprocess.Popen(
        [sys.executable, *command],
        env={**environment(), **(extra or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_jobs(folder: Path, jobs: list[dict], ranks: int = 2, timeout: float = 240) -> dict[str, list[dict]]:
    """Each job's results, one from each rank. Fails with what was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"folder": str(folder), "jobs": jobs}))
    done = launch([*TORCHRUN, str(ranks), str(WORKER), str(plan)], timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {
        job["name"]: [json.loads((folder / f"{job['name']}.{rank}.json").read_text()) for rank in range(ranks)]
        for job in jobs
    }
