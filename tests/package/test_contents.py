"""What is in the wheel and in the source distribution, against the tree; what their metadata say."""

from __future__ import annotations

import email
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import llava_sv
from llava_sv.extras import EXTRA_OF
from tests.package.build import ROOT, build

INFO = f"llava_sv-{llava_sv.__version__}.dist-info"
NEEDED_TO_WORK = ("scripts/", "docs/", "tests/", "playground/", "llava_sv/")


def parts_of_the_tree(source: Path) -> set[str]:
    """Files of the tree, as the build saw it; what the build itself left there does not count."""
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    return {
        file.as_posix()
        for file in files
        if file.parts[0] != "build" and not {"__pycache__", "llava_sv.egg-info"} & set(file.parts)
    }


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        return email.message_from_bytes(file.read(f"{INFO}/METADATA"))


def requirements(metadata, extra: str = "") -> dict[str, Requirement]:
    """Name -> what a plain install asks for, or what `extra` adds to it."""
    found = {}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        of_extra = re.search(r'extra == "([\w-]+)"', str(requirement.marker))
        if (of_extra[1] if of_extra else "") == extra:
            found[requirement.name.lower().replace("_", "-")] = requirement
    return found


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel, source):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    ours = {name for name in names if not name.startswith(INFO)}
    assert ours == {name for name in parts_of_the_tree(source) if name.startswith("llava_sv/")}
    assert {"llava_sv/py.typed", "llava_sv/data/mixtures/sources/ocr.yaml", f"{INFO}/licenses/LICENSE"} <= names
    assert f"{INFO}/entry_points.txt" in names


def test_the_source_distribution_builds_tests_and_documents_itself(sdist, source):
    top = f"llava_sv-{llava_sv.__version__}/"
    with tarfile.open(sdist) as file:
        names = {member.name.removeprefix(top) for member in file.getmembers() if member.isfile()}
    tree = parts_of_the_tree(source)
    assert {name for name in tree if name.startswith(NEEDED_TO_WORK)} <= names
    named = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "MANIFEST.in", ".ci/run"}
    assert named <= names
    added = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("llava_sv.egg-info/")} - added <= tree


def test_what_git_tracks_is_in_the_source_distribution(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = f"llava_sv-{llava_sv.__version__}/"
    with tarfile.open(sdist) as file:
        names = {name.removeprefix(top) for name in file.getnames()}
    assert {name for name in listed.splitlines() if (ROOT / name).exists()} - names == set()


def test_a_wheel_of_the_source_distribution_is_the_wheel_of_the_tree(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = build(unpacked, tmp_path / "again", "wheel")
    with zipfile.ZipFile(again) as a, zipfile.ZipFile(wheel) as b:
        assert set(a.namelist()) == set(b.namelist())
        record = f"{INFO}/RECORD"
        assert sorted(a.read(record).splitlines()) == sorted(b.read(record).splitlines())  # digests of all files


def test_one_place_says_the_version(wheel, sdist, metadata):
    assert metadata["Version"] == llava_sv.__version__
    assert wheel.name == f"llava_sv-{llava_sv.__version__}-py3-none-any.whl"
    assert sdist.name == f"llava_sv-{llava_sv.__version__}.tar.gz"
    for file in ("pyproject.toml", "README.md", "scripts/setup.sh"):
        assert llava_sv.__version__ not in (ROOT / file).read_text(encoding="utf-8"), file
    newest = re.search(r"^## \[(\d[\w.]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest
    assert newest[1] == llava_sv.__version__


def test_a_version_elsewhere_in_the_source_is_the_one_built(source, tmp_path):
    """`__version__` is read off the source: the build imports neither the package nor torch."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "llava_sv").mkdir()
    (tmp_path / "llava_sv" / "__init__.py").write_text('raise SystemExit("imported")\n__version__ = "9.8.7"\n')
    assert build(tmp_path, tmp_path / "out", "wheel").name == "llava_sv-9.8.7-py3-none-any.whl"


def test_metadata(wheel, metadata):
    assert metadata["Name"] == "llava-sv"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    with zipfile.ZipFile(wheel) as file:
        assert file.read(f"{INFO}/entry_points.txt").decode().split() == [
            "[console_scripts]", "llava-sv", "=", "llava_sv.cli:main",
        ]  # fmt: skip


def test_a_plain_install_is_light_and_training_is_complete(metadata):
    core, training = requirements(metadata), requirements(metadata, "train")
    assert {"torch", "transformers", "accelerate", "peft", "safetensors", "sentencepiece", "protobuf"} <= set(core)
    assert set(training) == set(EXTRA_OF)
    assert not set(core) & {*EXTRA_OF, "torchvision", "torchaudio", "timm", "flash-attn", "bitsandbytes"}
    assert set(requirements(metadata, "eval")) < set(training)
    for extra in ("dev", "train-gpu"):
        assert requirements(metadata, extra)["llava-sv"].extras == {"train"}, extra


def test_setup_knows_every_extra_and_no_other(metadata):
    known = re.search(r"^ +(flash[\w|-]*)\) extras", (ROOT / "scripts/setup.sh").read_text(encoding="utf-8"), re.M)
    assert known
    assert {*known[1].split("|"), "dev", "train"} == set(metadata.get_all("Provides-Extra"))


def test_every_package_that_is_imported_is_declared(metadata):
    """By the source of all modules: an import at any depth is of Python's, ours, or a declared package's."""
    import ast
    import sys

    of_dist = {"PIL": "pillow", "yaml": "pyyaml"}
    by_others = {"tokenizers": "transformers", "flash_attn": "flash-attn", "triton": "torch"}
    lines = [Requirement(line).name.lower().replace("_", "-") for line in metadata.get_all("Requires-Dist")]
    undeclared = {}
    for path in (ROOT / "llava_sv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"llava_sv"}:
                name = of_dist.get(top, by_others.get(top, top)).lower().replace("_", "-")
                if name not in lines:
                    undeclared.setdefault(top, path.name)
    assert undeclared == {}
