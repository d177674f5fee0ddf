"""Packages that a plain `pip install` leaves out, and the line that says how to get one that is needed.

Names of packages arrive, lines leave. Called by commands before they start work that would end in a missing package,
by `errors.exit_on_user_error` for an import that failed, and by `doctor`. Standard library only.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

TRAIN = "train"

EXTRA_OF: dict[str, str] = {
    "deepspeed": TRAIN,
    "datasets": TRAIN,
    "pyarrow": TRAIN,
    "matplotlib": TRAIN,
    "tensorboard": TRAIN,
    "wandb": TRAIN,
}
"""Package, by the name it is imported under -> the extra of pyproject.toml to install. `eval` brings two of them."""

SETUP = Path(__file__).parents[1] / "scripts" / "setup.sh"
"""There in a clone, and not beside an installed wheel."""


def pip_install(extra: str) -> str:
    """The command that adds an extra to what is installed; flash-attn's build reads the torch that is there."""
    options = "--no-build-isolation " if extra == "flash" else ""
    return f'pip install {options}"llava-sv[{extra}]"'


def how_to_get(extra: str = "", what: str = "") -> str:
    """The command that installs an extra, or the requirement `what`: the clone's script, or pip where there is none."""
    if SETUP.is_file():
        return "bash scripts/setup.sh" + (f" --extra {extra}" if extra not in ("", TRAIN) else "")
    return pip_install(extra) if extra else f'pip install "{what}"'


def lacking(*packages: str) -> list[str]:
    """One line for each of `packages` that is not installed."""
    return [_line(name) for name in packages if importlib.util.find_spec(name) is None]


def require(*packages: str) -> None:
    """Raise `ModuleNotFoundError`, with a line that tells what to install, where one of `packages` is not there."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(_line(name), name=name)


def line_of_missing(error: ModuleNotFoundError) -> str:
    """What to say of an import that failed; empty where the module comes with no extra, so that something is broken."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA_OF or importlib.util.find_spec(package) is not None:
        return ""
    return _line(package)


def _line(package: str) -> str:
    return f"this needs {package}, which a plain install leaves out: {pip_install(EXTRA_OF[package])}"
