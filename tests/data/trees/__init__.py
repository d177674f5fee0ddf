"""Small samples of every source of the catalogue, drawn in the layout that its owners publish: one module a task
group, whose `MAKERS` say for each source how its sample is made."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path

Maker = Callable[[Path], int]
"""Writes a sample of its source below the data root that it is given; returns how many LLaVA records it holds."""


def makers() -> dict[str, Maker]:
    """Every source's maker, by name."""
    found: dict[str, Maker] = {}
    for module in pkgutil.iter_modules(__path__):
        for name, maker in getattr(importlib.import_module(f"{__name__}.{module.name}"), "MAKERS", {}).items():
            if name in found:
                raise ValueError(f"source {name!r} has two makers")
            found[name] = maker
    return found


def make_tree(root: Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """Samples of the named sources (default: of all) below `root`; how many records each holds."""
    known = makers()
    return {name: known[name](root) for name in (known if names is None else names)}
