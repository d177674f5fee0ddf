"""Being asked to stop: signals and OUTPUT/stop.request come in, one decision of all ranks at a step's end goes out.

`train.train` holds `Signals` around the whole run; `faults.FaultsCallback` asks `Stopper` after each step. SIGTERM (a
preemption) and SIGUSR1 (SLURM's early warning) only set a flag: the ranks then save a checkpoint and leave with exit
code 75. Ctrl-C ends at once, unless a checkpoint is being written. OUTPUT/stop.request asks without any signal: it
reaches rank 0 whatever launcher stands between, and however many nodes there are; scripts/common.sh writes it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from llava_sv.errors import CANNOT_WRITE, INTERRUPTED, PREEMPTED, Stopped
from llava_sv.files import write_json

REQUEST = "stop.request"
"""A file in OUTPUT whose presence asks the run to save and stop; with the word SIGINT in it, to stop without saving."""

RECORD = "stopped.json"
"""Written into OUTPUT when a run stops early: `exit_code`, `line`, `why`, `step`, `checkpoint`. The next start takes it
away."""

REASONS = ("", "SIGUSR1", "SIGTERM", REQUEST, "SIGINT", "not written")
"""Why a run stops; where ranks differ, the later one holds."""

POLL_SECONDS = 1.0
"""How often rank 0 looks for `REQUEST`."""


class Signals:
    """Handlers of SIGTERM, SIGUSR1 and SIGINT for as long as the `with` lasts; without effect outside the main thread.

    `received` is the signal that came, if any. `saving`: while it is set, Ctrl-C waits for the step's end.
    """

    def __init__(self) -> None:
        self.received = ""
        self.saving = False
        self.left: Any = None
        """Shared with processes that read data: 1 once the run is over and SIGTERM is their end again."""
        self._process = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.received, self.saving, self._process = "", False, os.getpid()
        self.left = multiprocessing.RawValue("b", 0)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        self.left.value = 1

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a process that reads data has inherited the handler: its parent decides
        name = signal.Signals(number).name
        if name != "SIGINT":
            self.received = self.received or name
            return
        again, self.received = self.received == "SIGINT", name
        if not (again or self.saving):
            raise KeyboardInterrupt


SIGNALS = Signals()
"""Those of this process."""


class _SparedWorker:
    """A DataLoader worker's start: what it did before, and then SIGTERM passes by it. SLURM and others signal every
    process of a job; a reader that died of it would tear down the step that must still be finished and saved."""

    def __init__(self, before: Any, left: Any) -> None:
        self.before, self.left = before, left

    def __call__(self, worker: int) -> None:
        if self.before is not None:
            self.before(worker)
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.left is None or self.left.value:
            os._exit(0)  # the interpreter's end, which would wait for this process


def spare_workers(loader: Any) -> Any:
    """`loader`, whose workers leave signals to their parent."""
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's stands before torch's
    if getattr(inner, "num_workers", 0):
        inner.worker_init_fn = _SparedWorker(inner.worker_init_fn, SIGNALS.left)
    return loader


class Stopper:
    """Agreement over ranks at a step's end. output: OUTPUT; main: whether this process is rank 0."""

    def __init__(self, output: str | Path, world_size: int, device: Any, main: bool) -> None:
        self.output, self.world_size, self.device, self.main = Path(output), world_size, device, main
        self.reason = ""
        self.could_not_write = False
        self._polled = -POLL_SECONDS

    def agree(self) -> str:
        """Why the run stops, the same on every rank; empty when it goes on. One number is reduced over all ranks."""
        wish = REASONS.index(self._wish())
        if self.world_size > 1:
            import torch
            import torch.distributed as dist

            value = torch.tensor([wish], dtype=torch.int32, device=self.device)
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
            wish = int(value.item())
        self.reason = REASONS[wish]
        return self.reason

    def _wish(self) -> str:
        if self.could_not_write:
            return "not written"
        wish = SIGNALS.received
        if self.main and wish != "SIGINT" and time.monotonic() - self._polled >= POLL_SECONDS:
            self._polled = time.monotonic()
            try:
                asked = (self.output / REQUEST).read_text(encoding="utf-8", errors="ignore")
            except OSError:
                return wish
            wish = next((name for name in REASONS[4:0:-1] if name in asked.split()), wish or REQUEST)
        return wish


def clear(output: str | Path) -> None:
    """Remove what an earlier run left: its record, and a request that it did not live to see. Called by rank 0 before
    it trains; under scripts/common.sh, which may already have asked again, the request stays."""
    (Path(output) / RECORD).unlink(missing_ok=True)
    if not launched() and not elastic_restart():
        (Path(output) / REQUEST).unlink(missing_ok=True)


def launched() -> bool:
    """Whether scripts/common.sh stands above this process: it turns `RECORD` into its exit code."""
    return os.environ.get("LLAVA_SV_LAUNCHED") == "1"


def elastic_restart() -> bool:
    """Whether torchrun has started this process anew after another one failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def restarted() -> bool:
    """Whether this is a repetition that no person asked for: torchrun's, or a SLURM job that was requeued."""
    return elastic_restart() or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def leave_again(output: str | Path, main: bool) -> None:
    """A run that stopped in good order is not taken up by torchrun's --max-restarts: raises `Stopped` as it did."""
    path = Path(output) / RECORD
    if not elastic_restart() or not path.is_file():
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    raise Stopped(record["exit_code"], record["line"] if main else "")


def stop(output: str | Path, main: bool, code: int, line: str, **more: Any) -> Stopped:
    """Rank 0 writes `RECORD`; returns what to raise.

    Under scripts/common.sh the processes leave with 0 once the record is there: launchers then neither start them anew
    nor print a traceback, and the script leaves with the record's code.
    """
    path = Path(output) / RECORD
    if main:
        try:
            write_json(path, {"exit_code": code, "line": line, **more})
            (Path(output) / REQUEST).unlink(missing_ok=True)
        except OSError:
            pass
    return Stopped(0 if launched() and (path.is_file() or not main) else code, line if main else "")


def describe(reason: str, step: int, checkpoint: Path | None, saved: bool) -> tuple[int, str]:
    """(exit code, line) of a run that leaves after `step` for `reason`; checkpoint: the last complete one."""
    kept = f"{checkpoint} is the last complete checkpoint" if checkpoint else "there is no complete checkpoint yet"
    again = "the same command goes on from there" if checkpoint else "the same command starts over"
    if reason == "SIGINT":
        return INTERRUPTED, f"interrupted after step {step:,}: {kept}; {again}"
    if reason == "not written":
        return CANNOT_WRITE, ""
    asked = "OUTPUT/stop.request" if reason == REQUEST else reason
    how = f"saved {checkpoint}" if saved else kept
    return PREEMPTED, f"asked to stop by {asked} after step {step:,}: {how}; {again}"
