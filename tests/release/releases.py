"""For the tests of releases: a release made by the command, damage to a copy of it, and a manifest made to fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llava_sv import cli
from llava_sv.release import manifest


def release(checkpoint: Path, out: Path, *flags: object) -> int:
    """`llava-sv release` without its test."""
    return cli.main(["release", str(checkpoint), "--out", str(out), "--no-smoke-test", *map(str, flags)])


def verify(folder: Path, *flags: object) -> int:
    """`llava-sv verify`."""
    return cli.main(["verify", str(folder), *map(str, flags)])


def copy_of(folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "download"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit_json(path: Path, change: Any) -> None:
    """`change` the values in a JSON file, in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def fitting_manifest(folder: Path) -> None:
    """The manifest made anew over what is there now, as somebody would who wants a changed release to pass."""
    (folder / manifest.NAME).unlink()
    manifest.make(folder, {"name": "changed"})
