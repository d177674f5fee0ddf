"""scripts/check_package.sh: what it refuses; and (slow) both distributions installed from scratch and asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from llava_sv import cli
from tests.checkpoints import SKIP, save_checkpoint
from tests.package.build import ROOT

ZOO = ROOT / "playground" / "zoo" / "tiny-llava-skip"


def check_package(*arguments: str, timeout: int = 60, python: str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "scripts/check_package.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unknown option '--bogus'; known: --wheel, --sdist, --checkpoint DIR, "),
        (["--checkpoint"], "--checkpoint needs a value"),
        (["--checkpoint", "docs"], "--checkpoint docs: no config.json there; name a checkpoint folder"),
        (["--image", "nowhere.png"], "--image nowhere.png: no such file"),
    ],
)
def test_refused(arguments, message):
    done = check_package(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"check_package: {message}")
    assert done.stderr.count("\n") == 1


def test_an_interpreter_without_the_packages_is_refused():
    done = check_package("--wheel", python="/bin/false")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "check_package: /bin/false lacks torch or transformers: bash scripts/setup.sh, or name"
    )


def test_the_picture_that_it_asks_about_is_drawn(tmp_path):
    """Without --image the script draws the toy data: its own line, run here."""
    script = (ROOT / "scripts" / "check_package.sh").read_text()
    flags = re.search(r'llava_sv\.cli (data toy --output) "\$work/toy" (.*) >/dev/null', script)
    asked = re.search(r'"\$work/toy/(\S+)"', script)
    assert cli.main([*flags[1].split(), str(tmp_path / "toy"), *flags[2].split()]) == 0
    assert (tmp_path / "toy" / asked[1]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_from_scratch_it_chats_as_this_tree_does(kind, tmp_path):
    """Needs a package index: torch and the rest are installed anew, into an environment that is deleted afterwards."""
    checkpoint = ZOO if ZOO.is_dir() else save_checkpoint(tmp_path / "model", SKIP)
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(tmp_path / "image.png")
    out = tmp_path / "built"
    arguments = ["--checkpoint", str(checkpoint), "--image", str(tmp_path / "image.png"), "--out", str(out), "--types"]
    done = check_package(f"--{kind}", *arguments, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"check_package: {kind}: mypy sees its types" in done.stdout
    assert "check_package: good: llava-sv " in done.stdout
    assert [path.suffix for path in out.iterdir()] == [".whl" if kind == "wheel" else ".gz"]
