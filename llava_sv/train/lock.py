"""One training at a time in an OUTPUT: rank 0 holds OUTPUT/.lock, which the system gives back when its process ends.

`train.train` holds it around the run: a training that has outlived its script (killed with -9, a lost node) would
otherwise write the checkpoints that the same command, run again, reads and removes.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llava_sv.cluster import agree
from llava_sv.errors import UserError

LOCK = ".lock"

PATIENCE = 20.0
"""Seconds for a run that is being killed to end, before another is refused."""

TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def held(args: Any) -> Iterator[None]:
    """OUTPUT is this run's inside. Every rank calls it; all raise the same `UserError` where another run has it.

    Where the storage knows no locks, or cannot be written, there is none.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) != args.world_size:
        yield  # each takes itself for rank 0: `check_world` says so
        return
    output, file, problem = Path(args.output_dir), None, ""
    made = args.process_index == 0 and not output.exists()
    if args.process_index == 0:
        file, problem = take(output)
    problem = agree.gather(problem)[0]
    if problem:
        agree.leave()
        raise UserError(problem)
    try:
        yield
    finally:
        if file is not None:
            (output / LOCK).unlink(missing_ok=True)
            file.close()
            if made and not any(output.iterdir()):
                output.rmdir()


def take(output: Path, patience: float | None = None) -> tuple[IO[str] | None, str]:
    """(the lock's open file, or None where there is no locking; why this run may not go on, or "")."""
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    try:
        import fcntl

        output.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(output / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  # closed by its holder's end
            try:
                # of the process, not of the open file: what it forks to read data does not hold it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                said = _holder(file)
                file.close()
                if error.errno not in TAKEN:
                    return None, ""
                if time.monotonic() > deadline:
                    return None, (
                        f"--output_dir {output}: another training is under way there{said}; wait for its end, ask it "
                        f"to stop (touch {output}/stop.request), or choose another --output_dir"
                    )
                time.sleep(0.5)
                continue
            if _is(file, output / LOCK):
                break
            file.close()  # its holder has just removed it
    except (ImportError, OSError):
        return None, ""
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError:
        pass  # a full disk: whose it is stays unsaid
    return file, ""


def _holder(file: IO[str]) -> str:
    file.seek(0)
    said = file.read(200).strip()
    return f" ({said})" if said else ""


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
