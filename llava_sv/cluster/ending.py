"""How a process of a run of several ends: with its exit code, whatever libraries have left running.

Programs of several processes (training's entries, `doctor --cluster`, `bench memory --ranks`) wrap their work in
`in_order`. Threads of the process group's
backend may outlive the group; one that wants to release a Python object while the interpreter is being taken down
aborts the process (SIGABRT, "terminate called without an active exception"), after all work has been done and saved.
So what Python does at its end is done here, by hand, and the process leaves without taking anything down.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from llava_sv.errors import INTERRUPTED

PATIENCE = 60.0
"""Seconds that Python threads get to finish where the run has failed or stopped; daemon threads get none, as elsewhere.
A run that is done waits for them as long as they take: they may be writing what it made."""


def in_order(main: Callable[[], int]) -> int:
    """Run `main`, a whole program, and return its exit code; where this process is one of several, leave with it.

    There, an exception prints its traceback and leaves with 1, `SystemExit` with its own code.
    """
    if not several():
        return main()
    try:
        code = main()
    except SystemExit as ending:
        code = _code_of(ending)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = INTERRUPTED
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave_at_once(code)


def several() -> bool:
    """Whether this process is one of several."""
    world = os.environ.get("WORLD_SIZE", "1")
    return world.isdigit() and int(world) > 1


def _code_of(ending: SystemExit) -> int:
    """The exit code that Python gives this; a text is printed."""
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1


def _finish_threads() -> None:
    """Let pools hand out what they were given (as Python does before its atexit functions), and wait for threads."""
    for function in reversed(getattr(threading, "_threading_atexits", ())):
        function()
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()


def leave_at_once(code: int) -> NoReturn:
    """End this process with `code`: threads are waited for (see `PATIENCE`), atexit functions run, output is flushed,
    and no more."""
    with contextlib.suppress(SystemExit):
        sys.exit(code)  # trackers put their own in its place, to tell a run that failed from one that finished
    waiting = threading.Thread(target=_finish_threads, daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    if code == 0 and waiting.is_alive():
        names = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
        print(f"note: done; waiting for work under way ({', '.join(names) or 'a pool'})", file=sys.stderr, flush=True)
        waiting.join()
    try:
        atexit._run_exitfuncs()
    except BaseException:  # one that fails changes no exit code
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
