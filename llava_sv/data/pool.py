"""Processes that work for one command: how many, and that none outlives it. Called by `data.shard` and
`data.shard_index`."""

from __future__ import annotations

import os
import threading
import time


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with(parent: int) -> None:
    """From now on this process ends where its `parent` does: a pool's process would wait for ever where its parent was
    killed, and hold the locks that it has inherited."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
