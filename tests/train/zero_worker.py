"""Runs several jobs, one after another, in one group of processes: torchrun ... zero_worker.py PLAN.json

Starting torch and DeepSpeed costs more than a tiny training does; so a test file starts one pair of processes for all
its jobs. PLAN.json: {"folder": where results go, "jobs": [{"name", "argv"}, ...]}. Each process writes
folder/NAME.RANK.json: {"code": exit code of the run, "seen": for each training step the samples it saw}.
A job's "anchor": false takes out the dummy image that a batch without images runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def forget_accelerator() -> None:
    """The library keeps one precision, one DeepSpeed plugin and so on for a process: the next job brings its own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any):
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def watched_step(seen: list[dict]) -> Any:
    """LLaVATrainer.training_step that notes what is in each batch: ids of samples, and views of each image."""
    from llava_sv.train.llava_trainer import LLaVATrainer

    step = LLaVATrainer.training_step

    def noting(self, model, inputs, *args, **kwargs):
        mask = inputs["attention_mask"].bool()
        rows = [ids[keep].tolist() for ids, keep in zip(inputs["input_ids"], mask)]
        images = inputs.get("images")
        views = [image.shape[0] if image.dim() == 4 else 1 for image in ([] if images is None else images)]
        seen.append({"rows": rows, "views": views})
        return step(self, model, inputs, *args, **kwargs)

    return noting


def run_job(argv: list[str], anchor: bool = True) -> dict[str, Any]:
    """Train as `argv` says in this process, which may go on to another job."""
    from llava_sv.errors import exit_on_user_error
    from llava_sv.model.multimodal_encoder.vision_tower import VisionTower
    from llava_sv.train import distributed, train
    from llava_sv.train.llava_trainer import LLaVATrainer

    seen: list[dict] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(LLaVATrainer, "training_step", watched_step(seen)))
        stack.enter_context(patched(distributed, "leave_together", lambda: None))
        if not anchor:
            nothing = lambda self: torch.empty(0, 3, 1, 1)  # noqa: E731
            stack.enter_context(patched(VisionTower, "dummy_images", nothing))
        code = exit_on_user_error(train.train, argv=argv)
    return {"code": code, "seen": seen}


def main(plan_path: str) -> None:
    torch.set_num_threads(1)
    plan = json.loads(Path(plan_path).read_text())
    rank = int(os.environ["RANK"])
    for job in plan["jobs"]:
        result = run_job(job["argv"], job.get("anchor", True))
        (Path(plan["folder"]) / f"{job['name']}.{rank}.json").write_text(json.dumps(result))
        forget_accelerator()
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
