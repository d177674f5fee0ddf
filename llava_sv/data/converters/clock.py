"""How long this process has spent inside the readers of annotation files. `data.mix_parts` asks, `read` tells."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_spent = 0.0


def reading_seconds() -> float:
    """Since the process began."""
    return _spent


def timed(read: Callable[P, T]) -> Callable[P, T]:
    """The function, its time counted as reading."""

    @functools.wraps(read)
    def timing(*args: P.args, **kwargs: P.kwargs) -> T:
        global _spent
        began = perf_counter()
        try:
            return read(*args, **kwargs)
        finally:
            _spent += perf_counter() - began

    return timing


def timed_stream(read: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """The generator function, the time that it takes to make each of its values counted as reading."""

    @functools.wraps(read)
    def timing(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        global _spent
        values = read(*args, **kwargs)
        while True:
            began = perf_counter()
            try:
                value = next(values)
            except StopIteration:
                return
            finally:
                _spent += perf_counter() - began
            yield value

    return timing
