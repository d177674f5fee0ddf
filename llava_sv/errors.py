"""One exception for a user's mistake, and the one place that turns it into a line and exit code 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from llava_sv.extras import line_of_missing

CANNOT_WRITE = 74
"""Exit code (EX_IOERR) of a run that could not write what it made: a full disk, a quota, a lost mount."""

PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a training that was asked to leave and saved: run the same command again."""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""`OSError.errno` of a disk, or a share of one, that has no room left."""


class UserError(ValueError):
    """Something the user can mend: says what is wrong, where, and how to mend it, in one line."""


class NoRoom(UserError):
    """The same, for a disk that is full: exit code `CANNOT_WRITE`."""


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

    A package that an extra would bring, and that is not installed, is the user's to install: one line, exit code 2.
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
        return CANNOT_WRITE if isinstance(error, NoRoom) else 2
    except ModuleNotFoundError as error:
        if not (line := line_of_missing(error)):
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        # the interpreter flushes once more on its way out: let that go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def exit_on_any_trouble(main: Callable[..., int | None], *args, **kwargs) -> int:
    """The same for commands that keep no books of their own about how they ended, as training does.

    What the system refuses (`OSError`) becomes one line with the path and exit code 2, or `CANNOT_WRITE` for a full
    disk; Ctrl-C one line and `INTERRUPTED`.
    """
    try:
        return exit_on_user_error(main, *args, **kwargs)
    except KeyboardInterrupt:
        line, code = "\ninterrupted", INTERRUPTED  # behind the terminal's ^C, or a bar
    except OSError as error:
        if error.errno is None:  # not the system's: a library's, or a bug
            raise
        line, code = f"error: {line_of(error)}", CANNOT_WRITE if error.errno in FULL else 2
    print(line, file=sys.stderr, flush=True)
    return code


def line_of(error: OSError) -> str:
    """`PATH: what the system said`, and what to do where the disk is full."""
    said = os.strerror(error.errno) if error.errno else str(error)
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return ": ".join([*named[-1:], said]) + ("; make room, and run it again" if error.errno in FULL else "")


def not_written(what: str, error: OSError, mend: str) -> UserError:
    """What to raise where `what` (`PATH:`, say) cannot be written; mend: what helps."""
    kind = NoRoom if error.errno in FULL else UserError
    return kind(f"{what} cannot be written ({os.strerror(error.errno) if error.errno else error}); {mend}")


def refused(error: OSError, mend: str) -> UserError:
    """What to raise where the system refused something that may be a path read or written; mend: what helps."""
    kind = NoRoom if error.errno in FULL else UserError
    return kind(f"{line_of(error)}; {mend}")
