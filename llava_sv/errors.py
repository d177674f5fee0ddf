"""One exception for a user's mistake, and the one place that turns it into a line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend: says what is wrong, where, and how to mend it, in one line."""


def exit_on_user_error(main: Callable[..., int | None], *args, **kwargs) -> int:
    """Run `main`; a `UserError` becomes one line on stderr and exit code 2. Other exceptions are bugs and travel on."""
    try:
        return main(*args, **kwargs) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
