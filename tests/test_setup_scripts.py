"""The shell scripts: they parse, refuse what they do not know, and call pip and pytest as promised.

pip and the interpreter are stood in for by a wrapper that writes its pip calls to a file, so nothing is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"])

FAKE_PYTHON = """#!/bin/bash
case "$*" in
    "-m pip --version") exit 0 ;;
    "-m pip "*) echo "${@:3}" >>"$FAKE_LOG" ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/pip && touch .venv/bin/llava-sv ;;
    *"print(sys.prefix)"*) echo "$FAKE_PREFIX" ;;
    *"m.version(sys.argv[1])"*) case " $FAKE_HAS " in *" ${@: -1} "*) exit 0 ;; *) exit 1 ;; esac ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_parses_and_names_no_machine(script):
    assert run("-n", str(script)).returncode == 0
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") or not os.access(script, os.X_OK)
    assert not re.search(r"https?://", text)


@pytest.mark.parametrize("script", ["setup.sh", "check.sh", "quickstart.sh", "families.sh"])
def test_unknown_option_is_exit_code_2_and_lists_the_known(script):
    done = run(f"scripts/{script}", "--bogus")
    assert done.returncode == 2
    assert "unknown option '--bogus'; known: --" in done.stderr


def test_unknown_extra_lists_the_known():
    done = run("scripts/setup.sh", "--extra", "bogus")
    assert done.returncode == 2
    assert "unknown extra 'bogus'; known: flash, train-gpu, serve, eval" in done.stderr


def test_quickstart_refuses_a_seed_that_is_no_number():
    done = run("scripts/quickstart.sh", SEED="two")
    assert done.returncode == 2
    assert "SEED must be a whole number, got 'two'" in done.stderr


def test_too_old_python_is_one_clear_line(tmp_path):
    old = tmp_path / "python2"
    old.write_text("#!/bin/bash\nexit 1\n")
    old.chmod(0o755)
    done = run("scripts/setup.sh", PYTHON=str(old))
    assert done.returncode == 2
    assert "needs Python 3.10 or newer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_ci_runs_the_tests_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "bash scripts/test.sh"]


# --- steps.sh --------------------------------------------------------------------------------------------------------

STEPS = """#!/usr/bin/env bash
# What this does.
#   bash scripts/made_up.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/steps.sh
options "$@"
check_seed
work=work started=$SECONDS
[ "$fresh" = 0 ] || rm -rf "$work"
mkdir -p "$work"
make() { echo "$*" >"$work/data"; }
step data "" "$work/data" make data ${TOY_TRAIN:+--train "$TOY_TRAIN"}
step sft "$work/data" "$work/model" env OUTPUT="$work/model" bash -c 'echo "${EPOCHS:-1}" >"$OUTPUT"'
"""


@pytest.fixture
def made_up(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/steps.sh", tmp_path / "scripts")
    (tmp_path / "scripts/made_up.sh").write_text(STEPS)

    def call(*arguments, **env):
        return run("scripts/made_up.sh", *arguments, cwd=tmp_path, **env)

    call.work = tmp_path / "work"
    return call


def test_a_step_is_done_once_and_its_mark_begins_with_its_seconds(made_up):
    assert made_up().returncode == 0
    assert int((made_up.work / "data.done").read_text().splitlines()[0]) < 60
    again = made_up(NPROC="2", OMP_NUM_THREADS="1")
    assert again.returncode == 0
    assert again.stdout.count("done before, in ") == 2


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"TOY_TRAIN": "200"}, "data was done by another command (then: nothing more; now: --train 200); set that"),
        ({"TOY_TRAIN": "300"}, {"TOY_TRAIN": "200"}, "data was done by another command (then: 300; now: 200); set"),
        ({"EPOCHS": "3"}, {}, "sft was done by another command (then: EPOCHS=3; now: nothing more); set that back"),
    ],
)
def test_a_step_done_by_another_command_is_not_passed_over(before, after, message, made_up):
    assert made_up(**before).returncode == 0
    made = (made_up.work / "data").read_text()
    done = made_up(**after)
    assert done.returncode == 2
    assert f"made_up: {message}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "--fresh" in done.stderr
    assert (made_up.work / "data").read_text() == made
    assert made_up("--fresh", **after).returncode == 0


def test_a_mark_of_seconds_alone_is_not_refused(made_up):
    assert made_up().returncode == 0
    for mark in made_up.work.glob("*.done"):
        mark.write_text("3\n")
    done = made_up(TOY_TRAIN="200")
    assert done.returncode == 0
    assert "data: done before, in 3 s" in done.stdout


def test_a_newer_input_has_its_step_done_anew(made_up):
    assert made_up().returncode == 0
    later = (made_up.work / "sft.done").stat().st_mtime + 5
    os.utime(made_up.work / "data", (later, later))
    assert made_up(EPOCHS="4").returncode == 0
    assert (made_up.work / "model").read_text() == "4\n"


def test_options_of_scripts_with_steps(made_up):
    assert made_up("--help").stdout == "What this does.\n  bash scripts/made_up.sh\n"
    done = made_up("--fresh", "10")
    assert (done.returncode, done.stderr) == (2, "made_up: unknown option '10'; known: --fresh, --help\n")


# --- constraints.txt -------------------------------------------------------------------------------------------------


def constraint_lines() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def test_constraints_are_exact_versions_of_public_packages():
    for line in constraint_lines():
        assert re.fullmatch(r'[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*( ; python_version >= "3\.11")?', line), line
    assert "torch==2.13.0" in constraint_lines()


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_constraints_pin_every_dependency_within_its_range():
    pinned = {Requirement(line).name.lower(): Requirement(line) for line in constraint_lines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["train"]]:
        wanted = Requirement(text)
        if wanted.name == project["name"]:
            assert wanted.extras == {"train"}
            continue
        assert wanted.name.lower() in pinned, f"{wanted.name} is not pinned"
        version = next(iter(pinned[wanted.name.lower()].specifier)).version
        assert wanted.specifier.contains(version), f"{wanted.name} {version} is outside {wanted.specifier}"


def test_heavy_packages_stay_out():
    names = {line.split("==")[0].lower() for line in constraint_lines()}
    assert names.isdisjoint({"torchvision", "torchaudio", "timm", "triton"})


# --- setup.sh --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.sh reads, a stand-in interpreter, and the environment that goes with it."""
    repo = tmp_path / "repo"
    (repo / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        shutil.copy(ROOT / name, repo / name)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    no_gpu = tools / "nvidia-smi"
    no_gpu.write_text("#!/bin/bash\nexit 9\n")
    no_gpu.chmod(0o755)
    env = {
        "PYTHON": str(python),
        "REAL_PYTHON": sys.executable,
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_PREFIX": str(repo / ".venv"),
        "FAKE_HAS": "",
        "TORCH_INDEX_URL": "",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    return repo, env


def pip_calls(env: dict[str, str]) -> list[str]:
    log = Path(env["FAKE_LOG"])
    return [call.split(" install ")[1] for call in log.read_text().splitlines()] if log.exists() else []


def test_setup_installs_torch_then_deepspeed_then_the_package_and_runs_twice(checkout):
    repo, env = checkout
    done = run(str(repo / "scripts/setup.sh"), cwd=repo.parent, **env)
    assert done.returncode == 0, done.stderr
    calls = pip_calls(env)
    assert calls[0] == "-c constraints.txt torch==2.13.0+cpu"
    assert calls[-2] == "-c constraints.txt --no-build-isolation deepspeed>=0.18"
    assert calls[-1] == "-c constraints.txt --no-build-isolation -e .[dev]"
    again = run(str(repo / "scripts/setup.sh"), cwd=repo.parent, **env)
    assert again.returncode == 0
    assert "up to date" in again.stdout
    assert pip_calls(env) == calls

    (repo / "pyproject.toml").write_text((repo / "pyproject.toml").read_text() + "\n# changed\n")
    assert run(str(repo / "scripts/setup.sh"), **env).returncode == 0
    assert len(pip_calls(env)) > len(calls)


def test_setup_takes_the_cuda_build_where_a_gpu_is(checkout):
    repo, env = checkout
    smi = Path(env["PATH"].split(":")[0]) / "nvidia-smi"
    smi.write_text('#!/bin/bash\necho "GPU 0: Something"\n')
    done = run(str(repo / "scripts/setup.sh"), **{**env, "TORCH_INDEX_URL": "index-of-mine"})
    assert done.returncode == 0, done.stderr
    assert pip_calls(env)[0] == "--index-url index-of-mine -c constraints.txt torch==2.13.0"


def test_setup_without_venv_leaves_an_installed_torch_alone(checkout):
    repo, env = checkout
    env = {**env, "FAKE_HAS": "torch", "FAKE_PREFIX": str(repo)}
    done = run(str(repo / "scripts/setup.sh"), "--no-venv", "--extra", "train-gpu", **env)
    assert done.returncode == 0, done.stderr
    calls = pip_calls(env)
    assert not any("torch==" in call for call in calls)
    assert calls[-1].endswith("-e .[dev,train-gpu]")
    assert not (repo / ".venv").exists()


# --- test.sh ---------------------------------------------------------------------------------------------------------

SAMPLE_TESTS = """
import os, pytest
def test_fast(): assert int(os.environ["OMP_NUM_THREADS"]) >= 1
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.gpu
def test_gpu(): assert 0, "runs where no GPU is"
"""


@pytest.fixture
def test_checkout(tmp_path):
    repo = tmp_path / "repo"
    (repo / "scripts").mkdir(parents=True)
    (repo / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", repo)
    shutil.copy(ROOT / "scripts/test.sh", repo / "scripts")
    shutil.copy(ROOT / "tests/conftest.py", repo / "tests")
    (repo / "scripts/setup.sh").write_text("#!/usr/bin/env bash\n")
    (repo / "tests/test_sample.py").write_text(SAMPLE_TESTS)
    return repo


def test_fast_tests_by_default_from_any_directory(test_checkout, tmp_path):
    script = str(test_checkout / "scripts/test.sh")
    done = run(script, cwd=tmp_path, LLAVA_SV_NO_VENV="1", PYTHON=sys.executable, CI="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 2 deselected" in done.stdout
    done = run(script, "-k", "nothing_of_that_name", LLAVA_SV_NO_VENV="1", PYTHON=sys.executable)
    assert done.returncode == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: nothing would be skipped")
def test_all_ends_with_what_was_skipped_and_why(test_checkout):
    done = run(str(test_checkout / "scripts/test.sh"), "--all", LLAVA_SV_NO_VENV="1", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout
    title, line = done.stdout.strip().splitlines()[-2:]
    assert title == "Skipped, and why:"
    assert "needs a CUDA device" in line


def test_a_failure_is_a_failure_with_all_too(test_checkout):
    (test_checkout / "tests/test_sample.py").write_text("def test_no(): assert 0\n")
    for arguments in ([], ["--all"]):
        script = str(test_checkout / "scripts/test.sh")
        assert run(script, *arguments, LLAVA_SV_NO_VENV="1", PYTHON=sys.executable).returncode == 1
