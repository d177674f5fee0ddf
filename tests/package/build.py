"""The wheel and the source distribution of this tree, built without a network for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LEFT_OUT = {".git", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", "__pycache__", "build", "dist"}
"""Names that no copy of the tree takes along."""
MADE_BY_RUNS = {"checkpoints", "runs", "wandb"}
PLAYGROUND = {"tiny", "zoo"}
"""What of playground/ is part of the repository; the rest is what runs write there."""


def not_part(folder: str, names: list[str]) -> set[str]:
    """What `shutil.copytree` passes over, of `names` in `folder`."""
    out = LEFT_OUT & set(names) | {name for name in names if name.endswith((".egg-info", ".pyc"))}
    if Path(folder) == ROOT:
        out |= MADE_BY_RUNS & set(names)
    if Path(folder) == ROOT / "playground":
        out |= set(names) - PLAYGROUND
    return out


def copy_tree(to: Path) -> Path:
    """The tree as it stands, without what runs and tools wrote into it: a build leaves files beside what it reads."""
    shutil.copytree(ROOT, to, ignore=not_part)
    return to


def build(source: Path, out: Path, kind: str) -> Path:
    """Build `source` into `out` by the backend that pyproject.toml names. kind: `wheel` or `sdist`."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as b, sys; print(b.build_{kind}(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = [*out.glob("*.whl" if kind == "wheel" else "*.tar.gz")]
    return made
