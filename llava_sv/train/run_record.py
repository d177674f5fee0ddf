"""What a run notes of itself: hardware, versions, flags, code, data, when it ran and for how many device hours.

Arguments arrive; `train.train` writes what leaves into train_summary.json under `record`, for the model card. Each
start of an unfinished run is a line of OUTPUT/starts.jsonl, so that a resumed one knows of those before. No secrets,
and of the machine no names or paths but those that flags give.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from llava_sv.cluster.agree import gather
from llava_sv.files import sha256_of, write_text

STARTS = "starts.jsonl"

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft")

NOT_FLAGS = (
    *("output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "hub_model_id", "local_rank"),
    *("disable_tqdm", "probe_batch", "model_name_or_path", "data_path", "image_folder"),
)
"""Names places or secrets, is set by the library, or stands among the settings."""

EMPTY: tuple[Any, ...] = (None, False, "", "no", [])
"""Ways to say that something is not wanted, which the library turns into each other."""

MANIFEST = "manifest.json"


def begin(args: Any, step: int, parts: tuple[Any, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """Note a start from `step`; every rank calls it. parts: the argument objects; settings: as checkpoints keep them.

    Returns the record so far, which `close` completes.
    """
    devices = gather((device_of(args), platform.node()))
    started = now()
    record = {
        "hardware": hardware(devices),
        "versions": versions(),
        "code": code(),
        "flags": flags(parts, settings),
        "local_bases": local_bases(settings),
        "data": data(settings.get("data_path")),
    }
    if args.should_save:
        path = Path(args.output_dir) / STARTS
        known = [row for row in read_starts(path) if row["step"] < step] if step else []
        rows = [*known, {"step": step, "started_utc": started, "world_size": args.world_size}]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return record


def close(record: dict[str, Any], output: Path, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The finished record. rows: those of metrics.jsonl; seconds: of training in all."""
    starts = read_starts(output / STARTS)
    return {
        "started_utc": starts[0]["started_utc"] if _whole(starts) else None,
        "ended_utc": now(),
        "starts": starts if _whole(starts) else None,
        "device_hours": device_hours(starts, rows, seconds),
        **record,
    }


def _whole(starts: list[dict[str, Any]]) -> bool:
    """Whether the run was noted from its first step; one that an older version began was not."""
    return bool(starts) and starts[0]["step"] == 0


def device_hours(starts: list[dict[str, Any]], rows: list[dict[str, Any]], seconds: float) -> float | None:
    """Hours times devices of the steps that count, over all starts; None where an earlier start was not noted.

    Of each start, the seconds of training from its step to the next one's, as metrics.jsonl has them.
    """
    if not _whole(starts):
        return None
    began = [max((row["seconds"] for row in rows if row["step"] <= one["step"]), default=0.0) for one in starts]
    ends = [*began[1:], seconds]
    total = sum(one["world_size"] * max(end - start, 0.0) for one, start, end in zip(starts, began, ends))
    return round(total / 3600, 6)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The lines of starts.jsonl; none where it is absent or damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if {"step", "started_utc", "world_size"} <= set(row)]
    except (OSError, ValueError, TypeError):
        return []


def now() -> str:
    """UTC, to the second: `2026-01-31 12:00:00`."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def device_of(args: Any) -> tuple[str, int | None]:
    """(name, bytes of memory) of this rank's device; memory of a CPU is the machine's, and not one process's."""
    import torch

    device = args.device
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return found.name, found.total_memory
    return f"{device.type} process", None


def hardware(devices: list[tuple[tuple[str, int | None], str]]) -> dict[str, Any]:
    """Devices of one kind counted together; nodes by how many host names there are, which are not kept."""
    from llava_sv.bench.clock import cpu_name

    counted = Counter(device for device, _ in devices)
    return {
        "devices": [{"name": name, "count": n, "memory_bytes": memory} for (name, memory), n in counted.items()],
        "nodes": len({host for _, host in devices}),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def versions() -> dict[str, str | None]:
    """This package's, python's, and those of the libraries that training stands on; None for one not installed."""
    import torch

    from llava_sv import __version__

    found: dict[str, str | None] = {"llava_sv": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda}


def code() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether its files were changed; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def flags(parts: tuple[Any, ...], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the argument objects that differ from their defaults and that `settings` does not tell of."""
    found = {}
    for part in parts:
        for one in fields(part):
            value = plain(getattr(part, one.name, None))
            hidden = one.name in NOT_FLAGS or one.name in settings or one.name.endswith("_token")
            default = plain(_default(one))
            same = value == default or (value in EMPTY and default in EMPTY)
            if not hidden and value is not MISSING and not same:
                found[one.name] = value
    return dict(sorted(found.items()))


def _default(one: Field) -> Any:
    if one.default is not MISSING:
        return one.default
    return None if one.default_factory is MISSING else one.default_factory()


def plain(value: Any) -> Any:
    """A value as JSON has it; `MISSING` for an object that is no setting."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        items = [plain(item) for item in value]
        return MISSING if MISSING in items else items
    if isinstance(value, Path):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else MISSING


def local_bases(settings: dict[str, Any]) -> list[str]:
    """Of the bases that the settings name, those that are folders here: names on the hub are the others."""
    names = (settings.get("model_name_or_path"), settings.get("vision_tower"))
    return [name for name in names if name and Path(name).expanduser().is_dir()]


def data(path: str | None) -> dict[str, Any] | None:
    """Of a mixture: its manifest's sha256, its recipe, and what stands close to a benchmark. None for other data."""
    if not path:
        return None
    folder = Path(path).expanduser()
    manifest = (folder if folder.is_dir() else folder.parent) / MANIFEST
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("kind") != "mixture":
        return None
    sources, left_out = _rows(values.get("sources")), _rows(values.get("left_out"))
    recipe = values.get("recipe")
    return {
        "manifest_sha256": sha256_of(manifest),
        "recipe": recipe.get("name") if isinstance(recipe, dict) else None,
        "records": values.get("records"),
        "contaminated": {
            str(source.get("source")): source["contaminates"]
            for source in sources
            if source.get("contaminates") and source.get("taken")
        },
        "left_out_as_contaminated": [left.get("source") for left in left_out if left.get("why") == "contaminated"],
    }


def _rows(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; a manifest that was written by hand stops no training."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
