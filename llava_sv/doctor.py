"""`llava-sv doctor`: what this machine has, what is missing, and how to get it. Reads the machine; changes nothing.

Arguments arrive from `llava_sv.cli`; a readable page leaves on stdout, the same facts as JSON with `--json FILE`.
Exit code 0 when models can be loaded, asked and converted here, 1 when a package that this takes is missing or too old.
What training takes beside it (the extra `train`) is listed apart.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from llava_sv.constants import GIB
from llava_sv.extras import TRAIN, how_to_get
from llava_sv.files import write_json

OPTIONAL: dict[str, tuple[str, str]] = {
    "flash-attn": ("flash_attention_2 kernels (CUDA)", "flash"),
    "liger-kernel": ("fused RMSNorm, SwiGLU and loss kernels (CUDA)", "train-gpu"),
    "bitsandbytes": ("8-bit and 4-bit loading (CUDA)", "train-gpu"),
}
"""Package -> (what it brings, the extra that installs it)."""


def _installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def required_packages(extra: str = "") -> list[dict[str, Any]]:
    """One dict a required package: `name`, `wanted` (the range of pyproject.toml), `version` or None, `ok`.

    extra: those that it adds, instead.
    """
    from packaging.requirements import Requirement

    rows = []
    for line in importlib.metadata.requires("llava-sv") or []:
        requirement = Requirement(line)
        always, wanted = (requirement.marker is None or requirement.marker.evaluate({"extra": e}) for e in ("", extra))
        if not wanted or (extra and always):
            continue
        version = _installed(requirement.name)
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        rows.append({"name": requirement.name, "wanted": str(requirement.specifier), "version": version, "ok": ok})
    return rows


def gpu_facts() -> dict[str, Any]:
    """`cuda_build` (of torch) and `devices`: one dict a GPU with name, memory in GiB, capability and bf16 support."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "name": properties.name,
                "memory_gib": round(total / GIB, 1),
                "free_gib": round(free / GIB, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": properties.major >= 8,
            }
        )
    return {
        "cuda_build": torch.version.cuda,
        "driver_present": shutil.which("nvidia-smi") is not None,
        "devices": devices,
    }


def attention_kernels() -> dict[str, bool]:
    """Attention implementations that `--attn_implementation` can name here -> whether they can run."""
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    return {
        "eager": True,
        "sdpa": True,
        "flash_attention_2": bool(is_flash_attn_2_available()),
        "flex_attention": bool(is_torch_flex_attn_available()),
    }


def machine_facts() -> dict[str, Any]:
    """Python, operating system, cores, and free memory and disk in GiB."""
    import psutil

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / GIB, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
    }


def find_missing(
    required: list[dict[str, Any]],
    optional: dict[str, str | None],
    gpu: dict[str, Any],
    training: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """What is not there: dicts of `what`, `why`, `how`, and `required` (whether all work is blocked by it)."""
    missing = []
    for row in required:
        if not row["ok"]:
            found = f"found {row['version']}" if row["version"] else "not installed"
            what = f"{row['name']}{row['wanted']}"
            missing.append({"what": what, "why": found, "how": how_to_get(what=what), "required": True})
    if lacking := [row for row in training or [] if not row["ok"]]:
        what = ", ".join(row["name"] + (f" (found {row['version']})" if row["version"] else "") for row in lacking)
        why = "what training, data files and charts take beside the rest"
        missing.append({"what": what, "why": why, "how": how_to_get(TRAIN), "required": False})
    if gpu["driver_present"] and not gpu["devices"]:
        missing.append(
            {
                "what": "a torch that sees the GPU",
                "why": f"the driver is here, but this torch is built for {gpu['cuda_build'] or 'CPU'}",
                "how": "TORCH_INDEX_URL=<index with CUDA builds> bash scripts/setup.sh, after pip uninstall torch",
                "required": False,
            }
        )
    if gpu["devices"]:
        for name, version in optional.items():
            if version is None:
                why, extra = OPTIONAL[name]
                missing.append({"what": name, "why": why, "how": how_to_get(extra), "required": False})
    return missing


def collect() -> dict[str, Any]:
    """All facts in one JSON-ready dict: machine, required, training, optional, gpu, attention, ..., missing, ok."""
    from llava_sv import __version__

    required, training = required_packages(), required_packages(TRAIN)
    optional = {name: _installed(name) for name in OPTIONAL}
    have_torch = any(row["name"] == "torch" and row["version"] for row in required)
    have_transformers = any(row["name"] == "transformers" and row["version"] for row in required)
    no_gpu: dict[str, Any] = {"cuda_build": None, "driver_present": False, "devices": []}
    gpu = gpu_facts() if have_torch else no_gpu
    missing = find_missing(required, optional, gpu, training)
    return {
        "llava_sv": __version__,
        "machine": machine_facts(),
        "required": required,
        "training": training,
        "optional": optional,
        "gpu": gpu,
        "attention": attention_kernels() if have_torch and have_transformers else {},
        "deepspeed": {"version": _installed("deepspeed"), "accelerator": "cuda" if gpu["devices"] else "cpu"},
        "missing": missing,
        "ok": not any(item["required"] for item in missing),
    }


def render(facts: dict[str, Any]) -> str:
    """The page a person reads."""
    machine, gpu = facts["machine"], facts["gpu"]
    lines = [
        f"llava-sv {facts['llava_sv']} on Python {machine['python']}, {machine['system']}",
        f"  cores      {machine['cores']}",
        f"  memory     {machine['memory_free_gib']} GiB free of {machine['memory_gib']}",
        f"  disk       {machine['disk_free_gib']} GiB free here",
    ]
    for index, device in enumerate(gpu["devices"]):
        lines.append(
            f"  GPU {index}      {device['name']}, {device['free_gib']} GiB free of {device['memory_gib']}, "
            f"capability {device['capability']}, bf16 {'yes' if device['bf16'] else 'no'}"
        )
    if not gpu["devices"]:
        lines.append("  GPU        none: fine for the quickstart and the tests, not for the real models")
    usable = [name for name, there in facts["attention"].items() if there]
    lines.append(f"  attention  {', '.join(usable) or 'unknown'}")
    lines.append(f"  deepspeed  {facts['deepspeed']['version'] or 'missing'} on {facts['deepspeed']['accelerator']}")
    lines += ["", "packages"]
    for row in facts["required"]:
        lines.append(f"  {'ok' if row['ok'] else '!!'}  {row['name']:<15} {row['version'] or '-':<14} {row['wanted']}")
    for row in facts["training"]:
        mark = "ok" if row["ok"] else "!!" if row["version"] else "--"
        lines.append(f"  {mark}  {row['name']:<15} {row['version'] or '-':<14} {row['wanted']} (training)")
    for name, version in facts["optional"].items():
        lines.append(f"  {'ok' if version else '--'}  {name:<15} {version or '-':<14} optional: {OPTIONAL[name][0]}")
    lines += ["", "missing" if facts["missing"] else "Nothing is missing."]
    for item in facts["missing"]:
        lines.append(f"  {item['what']}: {item['why']}. Get it: {item['how']}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`llava-sv doctor [--json FILE]`, and with `--cluster` what `cluster_doctor.main` does."""
    if "--cluster" in argv[: argv.index("--training") if "--training" in argv else None] and "--help" not in argv:
        from llava_sv import cluster_doctor

        return cluster_doctor.main(argv)
    parser = argparse.ArgumentParser(
        prog="llava-sv doctor",
        description="Say what this machine has, what is missing, and how to get it.",
        epilog="example: llava-sv doctor --json doctor.json",
    )
    parser.add_argument("--json", metavar="FILE", help="write the same facts as JSON")
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="compare the processes of a run with one another: CHECK_CLUSTER=1 bash scripts/v1_5/finetune_skip.sh",
    )
    args = parser.parse_args(argv)
    facts = collect()
    print(render(facts))
    if args.json:
        write_json(args.json, facts)
    return 0 if facts["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
