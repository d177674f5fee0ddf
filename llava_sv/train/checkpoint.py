"""Checkpoint folders: which are complete, which is the last, and the projector's own files.

The trainer writes through here; `train.py` asks here where to resume. A checkpoint counts only once its marker, written
last, lists files that are all there: whatever a killed run left half-written is ignored.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_sv.errors import UserError
from llava_sv.files import replacing, write_json
from llava_sv.model.adapters import FILES

MARKER = "complete.json"
"""Written last into checkpoint-N: the step, the world size, the settings, every file and its size in bytes."""

SUMMARY = "train_summary.json"
"""Written last into OUTPUT: its presence says that the run is finished."""

PROJECTOR = "mm_projector"
"""Parameters with this in their name are the projector's (the summaries among them)."""


def mark_complete(folder: Path, step: int, world_size: int, settings: dict[str, Any] | None = None) -> None:
    """Write the marker: call it when every rank has written its part of `folder`."""
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MARKER
    }
    write_json(folder / MARKER, {"step": step, "world_size": world_size, "settings": settings or {}, "files": files})


def what_is_torn(folder: Path) -> str | None:
    """Why `folder` is not a complete checkpoint, or None when it is."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = marker["files"].items()
    except FileNotFoundError:
        return f"it has no {MARKER}: saving was interrupted"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"its {MARKER} cannot be read"
    for name, size in files:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were saved"
    return None


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker of a complete checkpoint."""
    return json.loads((folder / MARKER).read_text(encoding="utf-8"))


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint-N in `output`, complete or not, by step."""
    found = []
    for folder in output.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if folder.is_dir() and step.isdigit():
            found.append((int(step), folder))
    return sorted(found)


def last_complete_checkpoint(output: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in `output`; torn ones are passed over."""
    for _, folder in reversed(checkpoints(Path(output))):
        if what_is_torn(folder) is None:
            return folder
    return None


def check_checkpoint(folder: Path) -> Path:
    """`folder` itself; `UserError` when it is not a complete checkpoint."""
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint: no folder {folder}")
    torn = what_is_torn(folder)
    if torn is not None:
        raise UserError(f"--resume_from_checkpoint: {folder} is not a complete checkpoint: {torn}; choose another")
    return folder


def forget_after(output: Path, step: int) -> list[Path]:
    """Take the marker from checkpoints past `step` (a run rewound to `step` will write them anew); returns them."""
    later = [folder for number, folder in checkpoints(output) if number > step and (folder / MARKER).exists()]
    for folder in later:
        (folder / MARKER).unlink()
    return later


def rotate(output: Path, limit: int | None, keep: Path, best: Path | None = None) -> None:
    """Remove the oldest checkpoints beyond `limit`, and torn ones before `keep`, which always stays, as does `best`
    (one of `limit`, unless that is 1)."""
    if limit is None or limit < 1:
        return
    older = [folder for _, folder in checkpoints(output) if folder not in (keep, best)]
    if best not in (None, keep):
        limit = max(1, limit - 1)
    complete = [folder for folder in older if what_is_torn(folder) is None]
    keep_too = complete[len(complete) - (limit - 1) :] if limit > 1 else []
    for folder in older:
        if folder not in keep_too:
            shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoints(output: Path) -> None:
    """Remove what an earlier run left that a new one would take up, or that would pass for its result."""
    for _, folder in checkpoints(output):
        shutil.rmtree(folder)
    own = ("metrics.jsonl", "starts.jsonl", "nonfinite.jsonl", "stopped.json", "loss.png")
    for name in (SUMMARY, *own, "model.safetensors.index.json", f"{PROJECTOR}.bin", *FILES):
        (output / name).unlink(missing_ok=True)
    for weights in output.glob("*.safetensors"):
        weights.unlink()


def projector_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projector's entries of a state dict, under LLaVA's names (`model.mm_projector.*`), on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in state.items() if f"{PROJECTOR}." in name}


def save_projector(folder: Path, state: dict[str, Tensor]) -> None:
    """Write mm_projector.bin (what LLaVA reads) and mm_projector.safetensors from a state dict that holds it."""
    projector = projector_state(state)
    if not projector:
        raise ValueError(f"no {PROJECTOR}.* among the {len(state)} entries to save in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (f"{PROJECTOR}.bin", lambda path: torch.save(projector, path)),
        (f"{PROJECTOR}.safetensors", lambda path: save_file(projector, path, metadata={"format": "pt"})),
    ):
        with replacing(folder / name) as temporary:
            write(temporary)
