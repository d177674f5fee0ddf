"""Checkpoints that are released beside the code, as their own folders tell: `playground/zoo`. Called by `release.zoo`.

A folder with `manifest.json` is a release; what `scripts/zoo_tiny.sh` found of it lies in `reports/NAME.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError
from llava_sv.files import read_json

RELEASED = Path("playground/zoo")
MADE_BY = "bash scripts/zoo_tiny.sh"
REPORTS = "reports"
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Released:
    """One folder. bytes: of all its files; weights: of the shards. evaluation: `llava-sv eval`'s report, or None."""

    name: str
    config: dict[str, Any]
    bytes: int
    weights: int
    evaluation: dict[str, Any] | None

    @property
    def family(self) -> str:
        return self.config.get("mm_family") or "llava"

    @property
    def dtype(self) -> str:
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    @property
    def tokens(self) -> str:
        """What an image becomes."""
        block = self.config.get("skip_vision")
        if not block:
            return "dense"
        retained, skipped = block.get("num_retained"), block.get("num_skipped")
        if block.get("merge") is False or skipped is None:
            return f"{retained} retained, the rest skipped"
        return f"{retained} retained, {skipped} skipped"


def read_released(root: Path = RELEASED) -> list[Released]:
    """Every release below `root`, by name; none where the folder is absent. `UserError` for one that is damaged."""
    if not root.is_dir():
        return []
    return [_read(folder) for folder in sorted(root.iterdir()) if (folder / "config.json").is_file()]


def _read(folder: Path) -> Released:
    manifest = read_json(folder / "manifest.json", MADE_BY)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(one, dict) and "bytes" in one for one in files.values()):
        raise UserError(f"{folder / 'manifest.json'}: no list of files with their bytes; run {MADE_BY}, which makes it")
    sizes = {name: int(one["bytes"]) for name, one in files.items()}
    report = folder.parent / REPORTS / f"{folder.name}.json"
    return Released(
        name=folder.name,
        config=read_json(folder / "config.json", MADE_BY),
        bytes=sum(sizes.values()),
        weights=sum(size for name, size in sizes.items() if name.endswith(WEIGHTS)),
        evaluation=read_json(report, MADE_BY) if report.is_file() else None,
    )
