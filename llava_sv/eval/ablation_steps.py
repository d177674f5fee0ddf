"""Steps of a long run: a command, what it leaves, and a mark that it is finished. Called by `ablation`.

A finished step is passed over, one that was stopped is done again (training goes on from its own checkpoint), and one
that was begun with another command is refused.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError
from llava_sv.files import read_json, write_json

OF_THE_MACHINE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers", "gradient_checkpointing"),
    *("save_steps", "report_to", "deepspeed", "use_cpu", "tf32"),
)
"""Training flags that may differ between the halves of a run. The batch that the first two make with the number of
processes may not: `BATCH`."""

BATCH = "--BATCH"
"""Beside the flags of a training: how many samples an optimizer step sees."""

ENTRY = "llava_sv/train/train_mem.py"
"""The word in a training script's command that flags follow."""


@dataclass(frozen=True)
class Step:
    """One command, and how to tell that it is finished."""

    name: str
    """seedN/KIND/WHAT, or KIND for what all seeds share."""
    command: list[str]
    product: Path
    """What it leaves; removed before the step is done anew."""
    env: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    """Variables that it must not see."""
    needs: Path | None = None
    """What it reads: newer than its mark, the step is done anew."""

    @property
    def kind(self) -> str:
        """data, pretrain, train or eval."""
        parts = self.name.split("/")
        return parts[min(1, len(parts) - 1)]

    def environment(self) -> dict[str, str]:
        """Of its process."""
        kept = {name: value for name, value in os.environ.items() if name not in self.unset}
        return {**kept, "DRY_RUN": "0", **self.env}

    def line(self) -> str:
        """As a line for a shell."""
        unset = [word for name in self.unset if name in os.environ for word in ("-u", name)]
        return shlex.join(["env", *unset, *(f"{name}={value}" for name, value in self.env.items()), *self.command])


def paired(words: list[str]) -> dict[str, str]:
    """Flags of a command with their values; under "" what stands before the first. Of a repeated flag, the last."""
    pairs: dict[str, list[str]] = {"": []}
    last = ""
    for word in words:
        if word.startswith("--"):
            last, equals, value = word.partition("=")
            pairs[last] = [value] if equals else []
        else:
            pairs[last].append(word)
    return {name: " ".join(values) for name, values in pairs.items()}


def training_flags(step: Step) -> dict[str, str]:
    """The flags that a training script comes to, and `BATCH`: samples that all processes together see in an optimizer
    step. `UserError` with the script's own words where it refuses."""
    if not Path(step.command[1]).is_file():
        raise UserError(f"no {step.command[1]} here: run this in the repository's root")
    env = {**step.environment(), "DRY_RUN": "1"}
    done = subprocess.run(step.command, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{step.command[1]}: {said[-1].removeprefix('error: ')}")
    words = done.stdout.splitlines()
    at = words.index(ENTRY)
    flags = {f"--{name[2:].replace('-', '_')}": value for name, value in paired(words[at + 1 :]).items() if name}
    batch = _processes(paired(words[:at]))
    for name in ("--per_device_train_batch_size", "--gradient_accumulation_steps"):
        batch *= int(flags.get(name, 1))
    return {**flags, BATCH: str(batch)}


def _processes(launcher: dict[str, str]) -> int:
    """How many processes a launcher with these flags starts, on all nodes."""
    if "--hostfile" in launcher:
        try:
            hosts = Path(launcher["--hostfile"]).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"HOSTFILE={launcher['--hostfile']}: {error.strerror}") from error
        return sum(map(int, re.findall(r"^[^#\n]*\bslots=(\d+)", hosts, re.M)))
    per_node = launcher.get("--num_gpus") or launcher.get("--nproc_per_node") or "1"
    return int(per_node) * int(launcher.get("--nnodes", "1"))


def resolve(step: Step) -> list[str]:
    """What makes two steps the same: the training flags that a script comes to and their batch, less those of the
    machine, or the command itself without its interpreter. `UserError` where a script refuses."""
    if step.command[0] != "bash":
        return step.command[1:]
    flags = training_flags(step)
    return [word for name in flags if name.removeprefix("--") not in OF_THE_MACHINE for word in (name, flags[name])]


def what_changed(was: list[str], now: list[str]) -> str:
    """Flags that differ between two resolved commands, in words; empty where none does."""
    before, after = paired(was), paired(now)
    if BATCH not in before:  # noted by a version that did not compare it
        after.pop(BATCH, None)
    said = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old is None:
            said.append(f"without {name}, now {new or 'given'}")
        elif new is None:
            said.append(f"with {name} {old}, now without")
        elif old != new:
            said.append(f"with {f'{name} {old}'.strip()}, now {new}")
    return "; ".join(said)


class Marks:
    """What was done: OUTPUT/steps/NAME.json holds a step's resolved command, and its seconds once it is finished."""

    def __init__(self, output: Path) -> None:
        self.folder = output / "steps"

    def path(self, step: Step) -> Path:
        """The mark of a step."""
        return self.folder / f"{step.name.replace('/', '.')}.json"

    def read(self, step: Step) -> dict[str, Any]:
        """`command` and `seconds` (None: begun); empty where the step was never begun."""
        path = self.path(step)
        return read_json(path, f"bash scripts/ablation.sh without {step.product}") if path.is_file() else {}

    def check(self, step: Step, command: list[str]) -> None:
        """`UserError` where the step was begun with another command, and what that left is still there."""
        changed = what_changed(self.read(step).get("command", command), command)
        if changed and step.product.exists():
            raise UserError(
                f"{step.name}: begun {changed.replace('--BATCH', 'BATCH')}; set OUTPUT to another folder, "
                f"or remove {step.product}"
            )

    def seconds(self, step: Step) -> float | None:
        """What a finished step took; None where it is to be done (again)."""
        seconds = self.read(step).get("seconds")
        if seconds is None or not step.product.exists():
            return None
        stale = step.needs and step.needs.exists() and step.needs.stat().st_mtime > self.path(step).stat().st_mtime
        return None if stale else seconds

    def begin(self, step: Step, command: list[str]) -> None:
        """Note the command; what a finished step left that has to be done anew is removed."""
        if self.read(step).get("seconds") is not None and step.product.exists():
            shutil.rmtree(step.product) if step.product.is_dir() else step.product.unlink()
        write_json(self.path(step), {"command": command, "seconds": None})

    def end(self, step: Step, command: list[str], seconds: float) -> None:
        """The step is finished."""
        write_json(self.path(step), {"command": command, "seconds": round(seconds, 1)})


def execute(step: Step, log: Path) -> float:
    """Run a step, its output into `log`; returns its seconds. `UserError` with the log's end where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    step.product.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command, env=step.environment(), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:] if log.is_file() else []
        print("\n".join(tail), file=sys.stderr)
        where = f"whole output in {log}" if log.is_file() else f"its output, {log}, was removed meanwhile"
        raise UserError(f"{step.name} failed (exit code {code}; {where}); mend it and run this again: it goes on here")
    if not step.product.exists():
        raise UserError(
            f"{step.name} left no {step.product}: it was removed meanwhile; run this again: it goes on here"
        )
    return time.monotonic() - started
