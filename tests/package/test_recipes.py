"""The container recipes, checked by reading: no engine is here to build them."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess

import pytest

from tests.package.build import ROOT
from tests.package.recipes import (
    filled,
    ignored,
    problems_of_definition,
    problems_of_dockerfile,
    read_definition,
    read_dockerfile,
    used,
)

FOLDER = ROOT / "scripts" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (FOLDER / "llava-sv.def").read_text(encoding="utf-8")
INSTALL = (FOLDER / "install.sh").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "Docker.md").read_text(encoding="utf-8")
PATTERNS = [
    line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
]
STEPS = read_dockerfile(DOCKERFILE)


def parses(shell: str) -> bool:
    return subprocess.run(["bash", "-n"], input=shell, text=True, capture_output=True, check=False).returncode == 0


def test_the_dockerfile_has_no_problem_that_reading_finds():
    assert problems_of_dockerfile(DOCKERFILE, ROOT, PATTERNS) == []
    assert all(parses(step.value) for step in STEPS if step.name == "RUN")


GOOD = "FROM ubuntu:24.04\nUSER me\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("FROM ubuntu\nUSER me", "FROM ubuntu has no fixed tag"),
        ("FROM host:5000/ubuntu\nUSER me", "FROM host:5000/ubuntu has no fixed tag"),
        ("ARG BASE=ubuntu:latest\nFROM ${BASE}\nUSER me", "FROM ubuntu:latest has no fixed tag"),
        ("FROM ubuntu:24.04", "ends as root"),
        (GOOD + "USER root", "ends as root"),
        (GOOD + "COPY nowhere .", "COPY nowhere: not there"),
        (GOOD + "COPY .git .", "COPY .git: .dockerignore leaves it out"),
        (GOOD + "ENV A=${B}", "ENV uses B before an ARG or ENV names it"),
        ("ARG B=1\n" + GOOD + "WORKDIR $B", "WORKDIR uses B before an ARG or ENV names it"),
    ],
)
def test_each_problem_is_found(text, problem, tmp_path):
    (tmp_path / ".git").mkdir()
    assert problems_of_dockerfile(text, tmp_path, PATTERNS) == [problem]


def test_a_line_that_is_no_instruction_is_refused():
    with pytest.raises(ValueError, match="no instruction"):
        read_dockerfile("FROM a:1\nINSTALL this\n")


def test_what_the_build_never_reads_and_what_it_does():
    out = (".git/config", ".venv/bin/python", "checkpoints/a/model.safetensors", "playground/data/toy/sft.json",
           "llava_sv/model/__pycache__/a.pyc", "__pycache__/a.pyc", "playground/quickstart/report.md")  # fmt: skip
    into = ("llava_sv/model/config.py", "playground/tiny/llm/config.json", "playground/zoo/a/config.json",
            "scripts/docker/install.sh", "tests/data/test_check.py", "llava_sv/data/toy.py")  # fmt: skip
    assert [path for path in out if not ignored(path, PATTERNS)] == []
    assert [path for path in into if ignored(path, PATTERNS)] == []


def test_git_ignores_nothing_that_an_image_would_carry():
    """What .gitignore names in the root is what runs write: a build leaves it out too."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    names = [line.strip("/") for line in lines if line and not line.startswith("#")]
    carried = [name for name in names if not ignored(name.replace("*.py[cod]", "a.pyc").replace("*", "a"), PATTERNS)]
    assert [name for name in carried if name != ".coverage"] == []


def test_the_image_serves_the_command_and_its_layers_are_kept():
    last = {step.name: step.value for step in STEPS}
    assert last["ENTRYPOINT"] == '["llava-sv"]'
    assert last["VOLUME"] == '["/cache"]'
    order = [f"{step.name} {step.value}" for step in STEPS]
    environment = next(i for i, line in enumerate(order) if line.endswith("install.sh environment"))
    before = " ".join(order[:environment])
    assert order.index("COPY . .") > environment, "a change of the source would install everything anew"
    for file in ("pyproject.toml", "constraints.txt", "scripts/setup.sh", "LICENSE", "llava_sv/__init__.py"):
        assert file in before, f"{file} is read by the installation"


def test_no_secret_is_named():
    for text in (DOCKERFILE, DEFINITION, INSTALL):
        assert not re.search(r"(?i)token|password|secret|api_key", text)


def test_arguments_reach_the_script_that_reads_them():
    declared = {step.value.partition("=")[0] for step in STEPS if step.name == "ARG"} - {"BASE_IMAGE", "USER_ID"}
    said = INSTALL.split("# Environment:")[1].split("set -euo")[0]
    assert declared == set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)*\b", said)) - {"VENV"}


def test_the_definition_has_no_problem_that_reading_finds():
    assert problems_of_definition(DEFINITION, ROOT) == []
    _, sections = read_definition(DEFINITION)
    for name in ("post", "environment", "runscript", "test"):
        assert parses(sections[name]), name
    assert sections["runscript"].strip() == 'exec llava-sv "$@"'
    assert {"arguments", "help", "files"} <= set(sections)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("Bootstrap: docker", "Bootstrap: nothing", "Bootstrap must be docker"),
        (":13.0.2-devel-ubuntu24.04", "", "FROM nvidia/cuda has no fixed tag"),
        ("    scripts /opt", "    skripts /opt", "%files skripts: not there"),
        ("    llava_sv /opt/llava-sv/llava_sv", "    llava_sv", "%files llava_sv: no absolute place to go to"),
        ("    FLASH_ATTN=0\n", "", "{{ FLASH_ATTN }} is no argument"),
    ],
)
def test_each_problem_of_a_definition_is_found(before, after, problem):
    assert problem in problems_of_definition(DEFINITION.replace(before, after, 1), ROOT)


def test_both_recipes_make_the_same_image():
    header, sections = read_definition(DEFINITION)
    arguments = dict(line.strip().split("=", 1) for line in sections["arguments"].splitlines() if line.strip())
    docker = {step.value.partition("=")[0]: step.value.partition("=")[2] for step in STEPS if step.name == "ARG"}
    assert filled(header["from"], arguments) == docker["BASE_IMAGE"]
    empty = "default"  # an argument of Apptainer's has a value
    assert {name: docker[name].strip('"') or empty for name in arguments} == arguments
    assert f'[ "$TORCH_INDEX_URL" != {empty} ] || TORCH_INDEX_URL=""' in sections["post"]
    for step in ("system", "environment"):
        assert f"bash scripts/docker/install.sh {step}" in sections["post"]
    copied = {line.split()[0] for line in sections["files"].splitlines() if line.strip()}
    assert {"llava_sv", "scripts", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {path for path in copied if path.startswith("playground/")}


# --- install.sh ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ([], {}, "say what to install: system or environment"),
        (["environment"], {"DEVICE": "tpu"}, "DEVICE must be cuda or cpu, got 'tpu'"),
        (["environment"], {"FLASH_ATTN": "yes"}, "FLASH_ATTN must be 0 or 1, got 'yes'"),
        (["environment"], {"FLASH_ATTN": "1", "DEVICE": "cpu"}, "FLASH_ATTN=1 needs DEVICE=cuda"),
    ],
)
def test_install_refuses(words, environment, message):
    done = subprocess.run(
        ["bash", str(FOLDER / "install.sh"), *words], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, f"install: {message}\n")


FAKE = """#!/bin/bash
case "$0 $*" in
    *"python3 -m venv "*) mkdir -p "$3/bin"; for name in python pip; do cp "$0" "$3/bin/$name"; done ;;
    *python*"torch.version.cuda"*) echo "$FAKE_CUDA" ;;
    *nvcc*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    *) echo "${0##*/} $*" >>"$FAKE_LOG" ;;
esac
"""


@pytest.fixture
def image(tmp_path):
    """What an image holds when its environment is made; commands write down what they were called with."""
    for name in ("scripts/docker", "tools"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "scripts/docker/install.sh").write_text(INSTALL)
    (tmp_path / "scripts/setup.sh").write_text('echo "setup $*" >>"$FAKE_LOG"\n')
    (tmp_path / "constraints.txt").write_text("# torch==1\ntorch==2.13.0\n")
    for name in ("python3", "nvcc", "llava-sv"):
        (tmp_path / "tools" / name).write_text(FAKE)
        (tmp_path / "tools" / name).chmod(0o755)

    def call(**environment):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        paths = {"VENV": f"{tmp_path}/venv", "FAKE_LOG": str(log), "PATH": f"{tmp_path}/tools:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", str(tmp_path / "scripts/docker/install.sh"), "environment"],
            env={**os.environ, **paths, "FAKE_CUDA": "13", **environment},
            capture_output=True,
            text=True,
        )
        return done, log.read_text().splitlines() if log.exists() else []

    return call


def test_install_puts_the_cuda_build_of_torch_before_setup(image):
    done, calls = image()
    assert done.returncode == 0, done.stderr
    assert calls == ["pip install -q torch==2.13.0", "setup --no-venv --extra train-gpu", "llava-sv --version"]
    done, calls = image(FLASH_ATTN="1", TORCH_INDEX_URL="index-of-mine")
    assert calls[0] == "pip install -q --index-url index-of-mine torch==2.13.0"
    assert calls[1] == "setup --no-venv --extra train-gpu --extra flash"


def test_install_for_cpu_leaves_torch_to_setup(image):
    done, calls = image(DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    assert calls == ["setup --no-venv", "llava-sv --version"]


def test_install_refuses_a_compiler_of_another_cuda(image):
    done, calls = image(FAKE_CUDA="12")
    assert done.returncode == 2
    assert "torch is built for CUDA 12 and this image has CUDA 13: choose another BASE_IMAGE" in done.stderr
    assert len(calls) == 1


# --- docs/Docker.md --------------------------------------------------------------------------------------------------

COMMANDS = [
    line.strip()
    for block in re.findall(r"^```shell\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page(line):
    assert parses(line)
    words = shlex.split(line)
    declared = {step.value.partition("=")[0] for step in STEPS if step.name == "ARG"}
    for flag, value in itertools.pairwise(words):
        if flag == "--build-arg":
            assert value.partition("=")[0] in declared, value
        elif flag == "-f" or value.endswith((".sh", ".def")):
            assert (ROOT / value.split()[-1]).is_file(), value
        elif flag == "-v":
            inside = value.rpartition(":")[2]
            assert inside.startswith(("/opt/llava-sv/", "/cache")), value


def test_the_page_lists_every_argument_with_its_default_and_says_that_nothing_was_built():
    for step in STEPS:
        if step.name == "ARG":
            name, _, default = step.value.partition("=")
            (row,) = [line for line in PAGE.splitlines() if f"`{name}`" in line.split(" | ")[0]]
            assert default.strip('"') in row, name
    assert "Neither has been built" in PAGE
    assert used("${A} $B c") == {"A", "B"}
