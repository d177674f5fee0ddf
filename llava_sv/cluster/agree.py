"""Whether all processes of a run are about to train the same thing: versions, code, data, base models, settings.

`train.train` calls `check` once the process group is there and before the model is built; `cluster_doctor` shows the
same facts in a table. A difference is one line, the same on every rank.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")

MEND = {
    "data": "every node must read the same data (--data_path)",
    "output": "--output_dir must be on storage that all nodes share",
    "code": "the repository must be at the same commit everywhere",
    "settings": "start every node with the same flags",
    "model": "every node must have the same base models",
}
"""What to do about a difference, by the kind of fact; versions have a line of their own."""

PATHS = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path", "image_folder")
"""Settings that may be written otherwise on each node: what they name is compared instead."""

_WHOLE = 1 << 26
_BLOCK = 1 << 20
_BLOCKS = 64


@functools.cache
def digest_of(path: Path, whole: bool = False) -> str:
    """SHA-256 of a file and its size; of a file above 64 MiB, of 64 blocks spread over it, unless `whole`."""
    size = path.stat().st_size
    sum_ = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if whole or size <= _WHOLE:
            while block := file.read(_BLOCK):
                sum_.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                sum_.update(file.read(_BLOCK))
    return sum_.hexdigest()


def describe(path: Path | None, whole: bool = False) -> str:
    """A file's size and digest in a few characters; a folder's: a model's config, and the sizes of its weights, or the
    sizes of shards."""
    if path is None or not path.exists():
        return "missing"
    try:
        if path.is_file():
            return f"{path.stat().st_size:,} bytes, sha256 {digest_of(path, whole)[:12]}"
        sum_ = hashlib.sha256()
        for file in sorted(path.glob("*")):
            if file.name == "config.json":
                sum_.update(file.read_bytes())
            elif file.suffix in (".safetensors", ".bin", ".tar", ".parquet"):
                sum_.update(f"{file.name}|{file.stat().st_size}".encode())
        return f"sha256 {sum_.hexdigest()[:12]}"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def code_digest() -> str:
    """Twelve characters for this package's source as it stands, committed or not."""
    root = Path(__file__).parents[1]
    sum_ = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        sum_.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return sum_.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def facts(
    files: Mapping[str, Path | None], settings: Mapping[str, Any] | None = None, whole: bool = False
) -> dict[str, str]:
    """What must be the same on every rank, as `name: text`.

    files: what is compared by content, such as `{"data": path}`; a name's first word decides what `MEND` says.
    settings: of the run; those in `PATHS` are left out. whole: read files from end to end, however large.
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: _version(name) for name in PACKAGES}
    found["code"] = code_digest()
    found |= {name: describe(path, whole) for name, path in files.items()}
    for name, value in (settings or {}).items():
        if name not in PATHS:
            found[f"settings {name}"] = json.dumps(value, sort_keys=True, default=str)
    return found


def who() -> dict[str, Any]:
    """This process among the others: host, pid, and the numbers that its launcher gave it."""
    numbers = {name.lower(): int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK")}
    return {"host": socket.gethostname(), "pid": os.getpid(), **numbers}


def ranks_in_words(rows: Iterable[Mapping[str, Any]]) -> str:
    """`ranks 0, 1 (node-a)`, up to four of them."""
    rows = list(rows)
    numbers = ", ".join(str(row["rank"]) for row in rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    places = list(dict.fromkeys(row["host"] for row in rows))
    where = ", ".join(places[:4]) + (", ..." if len(places) > 4 else "")
    return f"rank{'s' if len(rows) > 1 else ''} {numbers} ({where})"


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each fact that is not the same on all ranks, naming the ranks and the values.

    rows: one of each rank, with `rank`, `host` and `facts` (as `facts` returns them).
    """
    problems = []
    for name in dict.fromkeys(name for row in rows for name in row["facts"]):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["facts"].get(name, "none"), []).append(row)
        if len(groups) > 1:
            said = "; ".join(f"{value} on {ranks_in_words(group)}" for value, group in list(groups.items())[:4])
            kind = name.split()[0]
            label = name.removeprefix("settings ")
            mend = MEND.get(kind, f"install one version of {name} on every node")
            problems.append(f"{label} differs: {said}; {mend}")
    return problems


def same_number(rows: list[dict[str, Any]]) -> list[str]:
    """A line where two processes were given one RANK, or one LOCAL_RANK and with it one GPU of a machine."""
    problems = []
    seen: dict[Any, dict[str, Any]] = {}
    for row in rows:
        for what, key in (("RANK", ("RANK", row["rank"])), ("GPU", ("GPU", row.get("gpu_id")))):
            if key[1] is None:
                continue
            if key in seen:
                other = seen[key]
                problems.append(
                    f"process {other['pid']} ({other['host']}) and process {row['pid']} ({row['host']}) both have "
                    f"{what} {key[1]}; give each its own"
                )
            seen[key] = row
    return problems


def gather(mine: Any) -> list[Any]:
    """`mine` of every rank, in order of rank; of this process alone where there is no process group."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, mine)
    return rows


def same_everywhere(values: Any) -> Any:
    """An array, or rank 0's where ranks have found others: the order of samples follows from lengths, and with other
    orders some samples would be trained on twice and others never."""
    import numpy as np

    mine = np.ascontiguousarray(values)
    sums = gather(hashlib.sha256(f"{mine.dtype} {mine.shape}".encode() + mine.tobytes()).hexdigest())
    if len(set(sums)) == 1:
        return values
    import torch.distributed as dist

    row = [mine if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(row, src=0)
    if dist.get_rank() == 0:
        others = sum(one != sums[0] for one in sums)
        print(
            f"note: {others} of {len(sums)} ranks found other lengths of samples (images that not every node can "
            "read?); those of rank 0 are taken",
            flush=True,
        )
    return row[0]


def leave(together: bool = True) -> None:
    """End the process group; once all ranks are there, unless they are on their way out by themselves.

    The first to exit would tear the others down before they have spoken.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


def check(files: Mapping[str, Path | None], settings: Mapping[str, Any]) -> None:
    """Every rank about to train must agree on these. Raises the same `UserError` on all where they do not."""
    rows = gather({**who(), "facts": facts(files, settings)})
    problems = same_number(rows) + differences(rows)
    if problems:
        leave()
        more = f" (and {len(problems) - 3} more; CHECK_CLUSTER=1 lists all)" if len(problems) > 3 else ""
        raise UserError(f"nothing was trained: {' | '.join(problems[:3])}{more}")
