"""One annotation tried: a function that makes its record arrives, an `Item` leaves, with what was wrong in words where
the annotation is not as published. Called by the converters, so that a damaged entry never ends a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llava_sv.data.converters.items import Item
from llava_sv.errors import UserError


def attempt(where: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> Item:
    """The record that `make(*arguments)` returns, or what it found wrong."""
    try:
        return Item(where, make(*arguments))
    except KeyError as error:
        return Item(where, problem=f"has no field {error.args[0]!r}")
    except (ValueError, UserError) as error:
        return Item(where, problem=str(error))
    except (TypeError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        return Item(where, problem=f"is not as published ({error})")


def text(entry: Any, field: str) -> str:
    """A field's text, stripped. `ValueError` where it is something else, or nothing."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, expected an object")
    value = entry[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {field!r} is {type(value).__name__}, expected text")
    found = str(value).strip()
    if not found:
        raise ValueError(f"field {field!r} is empty")
    return found
