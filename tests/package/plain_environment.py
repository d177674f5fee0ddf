"""An environment as a plain `pip install` of the wheel makes it, without a network.

A fresh virtual environment, into which pip puts the wheel alone. The packages that its metadata ask for, theirs, and
no others, are links to this interpreter's own: what the wheel does not declare is not there.
"""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pip
from packaging.requirements import Requirement


def normal(name: str) -> str:
    """A distribution's name, as names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(wheel: Path) -> list[str]:
    """The `Requires-Dist` lines of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(file.read(name)).get_all("Requires-Dist") or []


def closure(lines: list[str], ours: str = "") -> dict[str, importlib.metadata.Distribution]:
    """Name -> distribution, of everything that pip would install for these requirements with our extra `ours`."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(line, ours) for line in lines]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = normal(requirement.name)
        try:
            distribution = found[name] if name in found else importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra of somebody else's that is not installed here; `pip check` tells if it was needed
        found[name] = distribution
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(further, wanted) for further in distribution.requires or []]
    return found


def make(folder: Path, wheel: Path, extra: str = "") -> Path:
    """The environment in `folder`, with one of the wheel's extras if it is named; returns its `bin`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([str(python), "-c", query], text=True).strip())
    for distribution in closure(declared(wheel), extra).values():
        tops = {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            here = Path(str(distribution.locate_file(top)))
            if here.exists() and not (site / top).exists():
                (site / top).symlink_to(here)
    (site / "pip").symlink_to(Path(pip.__file__).parent)  # its code alone: it is no package of the environment
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    for further in (["install", "--no-index", "--no-deps", str(wheel)], ["check"]):
        subprocess.run([*command, *further], env=clean(), check=True, timeout=120)
    (site / "pip").unlink()
    return folder / "bin"


def clean() -> dict[str, str]:
    """Environment variables that lead nobody to this tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


COMMANDS = """
import contextlib, io, json, sys
said = io.StringIO()
with contextlib.redirect_stdout(said):
    exec(sys.argv[2])
sys.argv[0] = "llava-sv"
from llava_sv import cli
done = [[0, said.getvalue(), ""]]
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(command)
        except SystemExit as end:
            code = end.code
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def run_all(binaries: Path, cwd: Path, commands: list[list[str]], first: str = "") -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the program `first`, then of each `llava-sv` command: all in one process of the
    environment, since importing takes longest."""
    line = [str(binaries / "python"), "-c", COMMANDS, json.dumps(commands), first]
    done = subprocess.run(line, cwd=cwd, env=clean(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(done.stdout.splitlines()[-1])]
