"""Steps of a long run: a command, what it leaves, and a mark that it is finished. Called by `ablation`.

A finished step is passed over, one that was stopped is done again (training goes on from its own checkpoint), and one
that was begun with another command is refused.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError
from llava_sv.files import write_json

OF_THE_MACHINE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers", "gradient_checkpointing"),
    *("save_steps", "report_to", "deepspeed", "use_cpu", "tf32"),
)
"""Training flags that may differ between the halves of a run: training itself sees to it that the batch stays."""


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


def resolve(step: Step) -> list[str]:
    """What makes two steps the same: the training flags that a script comes to, less those of the machine, or the
    command itself without its interpreter. `UserError` with the script's own words where it refuses."""
    if step.command[0] != "bash":
        return step.command[1:]
    if not Path(step.command[1]).is_file():
        raise UserError(f"{step.command[1]} is not there: this family cannot be trained yet")
    env = {**step.environment(), "DRY_RUN": "1"}
    done = subprocess.run(step.command, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{step.command[1]}: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    words = done.stdout.splitlines()
    flags = words[words.index(ENTRY) + 1 :]
    pairs = [flags[at : at + 2] for at in range(0, len(flags), 2)]
    return [word for pair in pairs if pair[0].removeprefix("--") not in OF_THE_MACHINE for word in pair]


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
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def check(self, step: Step, command: list[str]) -> None:
        """`UserError` where the step was begun with another command."""
        was = self.read(step).get("command", command)
        if was != command:
            new = [word for word in command if word not in was] or ["other flags"]
            old = [word for word in was if word not in command] or ["other flags"]
            raise UserError(
                f"{self.path(step)}: {step.name} was made with {shlex.join(old)} where it is now {shlex.join(new)}; "
                "set OUTPUT to another folder, or remove this one"
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
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        print("\n".join(tail), file=sys.stderr)
        raise UserError(
            f"{step.name} failed (exit code {code}; whole output in {log}); mend it and run this again: it goes on here"
        )
    return time.monotonic() - started
