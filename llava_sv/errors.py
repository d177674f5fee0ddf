"""One exception for a user's mistake, and the one place that turns it into a line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

CANNOT_WRITE = 74
"""Exit code (EX_IOERR) of a run that could not write what it made: a full disk, a quota, a lost mount."""

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a training that was asked to leave and saved: run the same command again."""

INTERRUPTED = 130
"""Exit code of a training that Ctrl-C ended."""


class UserError(ValueError):
    """Something the user can mend: says what is wrong, where, and how to mend it, in one line."""


class Stopped(UserError):
    """A training that ended early and in good order. code: the exit code; line: what is printed on stderr, if any."""

    def __init__(self, code: int, line: str = "") -> None:
        super().__init__(line)
        self.code, self.line = code, line


def in_words(error: BaseException) -> str:
    """What a library says of damage, in one line that is not too long; where it says nothing, the error's kind."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def exit_on_user_error(main: Callable[..., int | None], *args, **kwargs) -> int:
    """Run `main`; a `UserError` becomes one line on stderr and exit code 2. Other exceptions are bugs and travel on.

    A reader that stops reading (`| head`) ends the program quietly, with exit code 1.
    """
    try:
        code = main(*args, **kwargs) or 0
        sys.stdout.flush()
        return code
    except Stopped as stop:
        if stop.line:
            print(stop.line, file=sys.stderr, flush=True)
        return stop.code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        # the interpreter flushes once more on its way out: let that go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
