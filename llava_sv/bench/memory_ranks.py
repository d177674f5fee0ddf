"""The memory of training over several processes: `python -m llava_sv.bench.memory_ranks CASES OUT`, under torchrun.

CASES: a JSON list of `Case`s. OUT: a folder that gets `rank-R.json`, the peak of each case in this process. Started by
`bench memory` and by a test.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llava_sv.bench.memory_cases import Case
from llava_sv.bench.memory_measure import STEPS, peak_of_tensors
from llava_sv.bench.memory_trace import enable_checkpointing, forward, make_inputs
from llava_sv.cluster.ending import in_order
from llava_sv.files import write_json
from llava_sv.model.language_model.decoders import model_class


def measure(cases: Sequence[Case], world: int = 2) -> list[int]:
    """Start `world` processes that run the cases one after another; the peak of each, over all processes."""
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder, "cases.json")
        write_json(listing, [asdict(case) for case in cases])
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        done = subprocess.run(
            [*command, "-m", __spec__.name, str(listing), folder],
            env=environment,
            capture_output=True,
            timeout=900,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"measuring over {world} processes failed:\n{done.stderr[-3000:]}")
        peaks = [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(world)]
    return [max(of_case) for of_case in zip(*peaks)]


def peak_of_case(case: Case) -> int:
    """Train it in this process, one of a group; the most bytes of tensors in its optimizer steps."""
    peak = peak_of_tensors(lambda watching: _train(case, watching))
    gc.collect()
    return peak


def _train(case: Case, watching: Callable[[bool], None]) -> None:
    config, work = case.config(), case.work()
    config.tokenizer_model_max_length = None
    torch.manual_seed(0)
    model = case.prepare(model_class(config)._from_config(config, dtype=work.weights))
    inputs = make_inputs(config, work)
    model.train()
    if work.checkpointing:
        enable_checkpointing(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if case.deepspeed is None:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        watching(True)
        for _ in range(STEPS):
            forward(wrapped, inputs, work).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        watching(False)
        return
    import deepspeed

    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=case.deepspeed)[0]
    del optimizer
    watching(True)
    for _ in range(STEPS * (1 + work.accumulating)):
        engine.backward(forward(engine, inputs, work))
        engine.step()
    watching(False)
    engine.destroy()


def main(argv: list[str]) -> int:
    """See the module's head."""
    listing, folder = argv
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ extension that compiles for a minute
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    cases = [Case(**values) for values in json.loads(Path(listing).read_text())]
    peaks = [peak_of_case(case) for case in cases]
    write_json(Path(folder, f"rank-{dist.get_rank()}.json"), peaks)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(in_order(lambda: main(sys.argv[1:])))
