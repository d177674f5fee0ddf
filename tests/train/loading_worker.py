"""Loads checkpoints under ZeRO-3 in a group of processes: torchrun ... loading_worker.py CASES.json

CASES.json: {"folder", "cases": [{"name", "what", "path", ...}]}. Each process writes folder/RANK.json: for each case
what went wrong ("said"), or how far the gathered weights are from those in "expected" ("worst"), or peaks of memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

MIB = 2**20
TOWER = SimpleNamespace(
    mm_vision_image_size=None,
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    mm_vision_feature_levels=None,
)


def resident() -> dict[str, float]:
    """Bytes in memory now, and at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {name: int(value) * 1024 for name, value in values.items()}


def peak_of(load: Any) -> float:
    """MiB by which `load` exceeds, at its highest, what was in memory before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()["VmRSS"]
    model = load()
    peak = (resident()["VmHWM"] - before) / MIB
    del model
    return peak


def run(case: dict[str, Any]) -> dict[str, Any]:
    from transformers import LlamaForCausalLM, MixtralForCausalLM

    from llava_sv.errors import UserError
    from llava_sv.model.checkpoint_io import gathered, load_strictly
    from llava_sv.model.loading import load_whole, read_config
    from llava_sv.model.multimodal_encoder.pretrained import load_vision_tower

    path, dtype = case["path"], getattr(torch, case.get("dtype", "float32"))

    def load() -> Any:
        if case["what"] == "tower":
            return load_vision_tower(path, TOWER, dtype=dtype).vision_tower["vision_model"]
        if case["what"] == "whole":
            return load_whole(path, read_config(path), dtype=dtype)
        kind = MixtralForCausalLM if case["what"] == "experts" else LlamaForCausalLM
        return load_strictly(kind, path, dtype=dtype)

    if case["what"] == "memory":
        library = peak_of(lambda: LlamaForCausalLM.from_pretrained(path, dtype=dtype))
        return {"library": library, "ours": peak_of(load)}
    try:
        model = load()
    except UserError as error:
        return {"said": str(error)}
    expected = torch.load(case["expected"])
    named = dict(model.named_parameters(remove_duplicate=False))
    assert all(hasattr(value, "ds_id") for value in named.values()), "not partitioned"
    with gathered(list(named.values())):
        worst = max((value.float() - expected.pop(name).float()).abs().max().item() for name, value in named.items())
    tied = {id(value) for value in named.values()}
    return {"worst": worst, "left": sorted(expected), "tensors": len(tied), "dtypes": _dtypes(named)}


def _dtypes(named: dict[str, torch.Tensor]) -> list[str]:
    return sorted({str(value.dtype) for value in named.values()})


def main(path: str) -> int:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    plan = json.loads(Path(path).read_text())
    results = {}
    for case in plan["cases"]:
        precision = {"bf16": {"enabled": case.get("dtype") == "bfloat16"}}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **precision}
        kept = HfDeepSpeedConfig(config)  # transformers finds it as long as it lives
        results[case["name"]] = run(case)
        del kept
    rank = torch.distributed.get_rank()
    (Path(plan["folder"]) / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    from llava_sv.cluster.ending import in_order

    sys.exit(in_order(lambda: main(sys.argv[1])))
