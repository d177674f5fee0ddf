"""README and docs: every command they show exists and takes the flags shown; every path they name is there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from llava_sv import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
MADE_BY_RUNNING = (
    "checkpoints/",
    "playground/analysis",
    "playground/data",
    "playground/quickstart",
    "playground/families",
    ".venv",
)
TRAINING_SCRIPT = re.compile(r"scripts/(v1_5|v1_5_hd|cos)/\w+\.sh")


def shell_lines(page: Path) -> list[str]:
    """Commands of ```bash blocks and of `code spans` that begin like one, continuations joined."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += [span for span in re.findall(r"`([^`\n]+)`", prose) if re.match(r"(\w+=\S+ )*(bash|llava-sv) ", span)]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip() and not part.startswith("#")]


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in shell_lines(page)})


@functools.cache
def help_of(name: str) -> str:
    module, function = cli.COMMANDS[name].target.split(":")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        getattr(importlib.import_module(module), function)(["--help"])
    return out.getvalue()


def test_the_pages_show_commands():
    shown = " ".join(line for _, line in COMMANDS)
    for needed in ("scripts/quickstart.sh", "llava-sv chat", "scripts/v1_5/finetune_skip.sh", "scripts/test.sh"):
        assert needed in shown


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_command_exists_and_takes_its_flags(page, line):
    words = shlex.split(line, comments=True)
    variables = [word.split("=")[0] for word in words if re.match(r"[A-Z_]+=", word)]
    words = words[len(variables) :]
    if words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file(), f"{page} runs {words[1]}"
        shared = ("common.sh", "steps.sh")
        read = script.read_text() + "".join((ROOT / "scripts" / name).read_text() for name in shared)
        for variable in variables:
            assert re.search(rf"\b{variable}\b", read), f"{page}: {words[1]} does not read {variable}"
        if TRAINING_SCRIPT.fullmatch(words[1]):
            return  # further flags are training's own; the dry run below parses them
        for flag in (word for word in words[2:] if word.startswith("--")):
            assert flag in read, f"{page}: {words[1]} does not know {flag}"
    elif words[0] == "llava-sv":
        name, rest = cli.resolve(words[1:])
        if name is None:
            assert words[1:] in (["--help"], ["--version"]), f"{page}: no command {line}"
            return
        text = help_of(name)
        for flag in (word for word in rest if word.startswith("--")):
            assert re.search(rf"{flag}\b", text), f"{page}: llava-sv {name} has no flag {flag}"
    elif words[0] == "sbatch":
        assert any((ROOT / word).is_file() for word in words[1:]), f"{page}: no script in {line!r}"
    else:
        assert words[0] in (".", "cd", "git"), f"{page}: do not know how to check {line!r}"


TRAINING = [line for _, line in COMMANDS if TRAINING_SCRIPT.search(line) and "sbatch" not in line]


@pytest.mark.parametrize("line", TRAINING)
def test_training_command_expands_to_flags_that_training_knows(line):
    done = subprocess.run(
        ["bash", "-c", f"DRY_RUN=1 {line}"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    flags = {word for word in words[words.index("llava_sv/train/train_mem.py") :] if word.startswith("--")}
    known = help_of("train")
    for flag in flags:
        assert re.search(rf"{flag}\b", known), f"training has no flag {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:llava_sv|scripts|playground|docs|tests)/[\w./{},-]*\w", text))
    for path in named:
        if path.startswith(MADE_BY_RUNNING) or "{" in path:
            continue
        assert (ROOT / path).exists() or (page.parent / path).exists(), f"{page.name} names {path}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
