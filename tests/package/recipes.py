"""Dockerfiles, .dockerignore and Apptainer recipes, read closely enough to check them where no engine is."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

INSTRUCTIONS = {"ARG", "FROM", "LABEL", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "USER", "ENTRYPOINT", "CMD"}
"""Those that this project's image uses; another one is refused until somebody says here how it is checked."""

PREDEFINED = {"PATH", "HOME"}
"""Variables that are there without an ARG or ENV."""

SECTIONS = {"help", "labels", "files", "arguments", "post", "environment", "runscript", "test"}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, continued lines joined."""

    name: str
    value: str


def read_dockerfile(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, in order; `ValueError` for a line that is none."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = []
    for whole in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, value = whole.strip().partition(" ")
        if name not in INSTRUCTIONS or not value.strip():
            raise ValueError(f"no instruction that is known here: {whole!r}")
        found.append(Instruction(name, value.strip()))
    return found


def used(value: str) -> set[str]:
    """Names of the variables that a value puts in."""
    return set(re.findall(r"\$\{?(\w+)", value))


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps `path` (relative, with slashes) out of the build. The last pattern that fits wins."""
    out = False
    parts = path.split("/")
    ancestors = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    for pattern in patterns:
        back = pattern.startswith("!")
        plain = pattern.lstrip("!").strip("/")
        if any(_fits(ancestor, plain) for ancestor in ancestors):
            out = not back
    return out


def _fits(path: str, pattern: str) -> bool:
    """A pattern against one path, slash by slash; `**/` stands for any number of folders."""
    if pattern.startswith("**/"):
        parts = path.split("/")
        return any(_fits("/".join(parts[i:]), pattern[3:]) for i in range(len(parts)))
    here, wanted = path.split("/"), pattern.split("/")
    return len(here) == len(wanted) and all(fnmatch.fnmatchcase(a, b) for a, b in zip(here, wanted))


def problems_of_dockerfile(text: str, root: Path, patterns: list[str]) -> list[str]:
    """What is wrong with a Dockerfile whose context is `root`, apart from the shell in it; one line each."""
    said, known, users, stages = [], set(PREDEFINED), [], 0
    for step in read_dockerfile(text):
        unknown = used(step.value) - known if step.name != "RUN" else set()
        said += [f"{step.name} uses {name} before an ARG or ENV names it" for name in sorted(unknown)]
        if step.name == "ARG":
            known.add(step.value.partition("=")[0])
        elif step.name == "ENV":
            known |= {word.partition("=")[0] for word in shlex.split(step.value)}
        elif step.name == "FROM":
            stages += 1
            said += problem_of_image(text, step.value)
            known = set(PREDEFINED)  # an ARG before FROM is seen by FROM alone
        elif step.name == "COPY":
            said += problems_of_copy(step.value, root, patterns)
        elif step.name == "USER":
            users.append(step.value)
        elif step.name in ("ENTRYPOINT", "CMD", "VOLUME") and not isinstance(json.loads(step.value), list):
            said.append(f"{step.name} is no JSON list, so that signals would reach a shell instead")
    if not stages:
        said.append("no FROM")
    if not users or users[-1] in ("root", "0"):
        said.append("ends as root")
    return said


def problem_of_image(text: str, image: str) -> list[str]:
    """The base image must have a tag that stays what it is."""
    for name in used(image):
        default = re.search(rf"^ARG {name}=(\S+)", text, re.M)
        image = image.replace(f"${{{name}}}", default[1] if default else "")
    tag = image.rpartition("/")[2].partition(":")[2]
    return [] if tag and tag != "latest" else [f"FROM {image or '(nothing)'} has no fixed tag"]


def problems_of_copy(value: str, root: Path, patterns: list[str]) -> list[str]:
    """Each source of a COPY must be there and not be ignored."""
    *sources, _ = shlex.split(value)
    said = []
    for source in sources:
        if not (root / source).exists():
            said.append(f"COPY {source}: not there")
        elif source != "." and ignored(source.rstrip("/"), patterns):
            said.append(f"COPY {source}: .dockerignore leaves it out")
    return said


def read_definition(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """(header, sections) of an Apptainer recipe; `ValueError` for a section that is unknown or there twice."""
    header: dict[str, str] = {}
    sections: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            if name not in SECTIONS or name in sections:
                raise ValueError(f"section {name!r} is unknown or there twice")
            sections[name] = ""
        elif name:
            sections[name] += line.removeprefix("    ") + "\n"
        elif line.strip() and not line.startswith("#"):
            key, colon, value = line.partition(":")
            if not colon:
                raise ValueError(f"header line without a colon: {line!r}")
            header[key.strip().lower()] = value.strip()
    return header, sections


def problems_of_definition(text: str, root: Path) -> list[str]:
    """What is wrong with an Apptainer recipe that is built in `root`, apart from the shell in it."""
    header, sections = read_definition(text)
    arguments = dict(line.strip().split("=", 1) for line in sections.get("arguments", "").splitlines() if line.strip())
    said = [
        f"{{{{ {name} }}}} is no argument" for name in re.findall(r"\{\{ ?(\w+) ?\}\}", text) if name not in arguments
    ]
    if header.get("bootstrap") != "docker":
        said.append("Bootstrap must be docker")
    said += problem_of_image("", filled(header.get("from", ""), arguments))
    for line in sections.get("files", "").splitlines():
        source, _, target = line.strip().partition(" ")
        if source and not (root / source).exists():
            said.append(f"%files {source}: not there")
        if source and not target.strip().startswith("/"):
            said.append(f"%files {source}: no absolute place to go to")
    return said


def filled(text: str, arguments: dict[str, str]) -> str:
    """`text` with `{{ NAME }}` replaced by the arguments' values."""
    return re.sub(r"\{\{ ?(\w+) ?\}\}", lambda found: arguments.get(found[1], ""), text)
