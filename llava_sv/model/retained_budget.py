"""`num_retained: auto`: how many tokens an image retains follows its content, within bounds, around an average budget.

Plain numbers only; `compression.adaptive` chooses. Called by `config`, which declares the fields, and by whoever puts
one block of settings over another.

What an image takes in the sequence does not follow its content: a token more that is retained is one less that is
skipped, and Nr + Ns stays `retained_mean` + `num_skipped`. So lengths are known before any picture is opened, and an
average Nr of `retained_mean` costs what a fixed Nr of `retained_mean` costs: the FFN's work is linear in Nr, and
attention's does not change.
"""

from __future__ import annotations

from typing import Any

from llava_sv.errors import UserError

AUTO = "auto"

FIELDS = ("retained_mean", "retained_min", "retained_max", "retained_threshold")
"""Of `SkipVisionConfig`; None where `num_retained` is a number."""

DEFAULT_MEAN = 100


def complete(skip: Any) -> None:
    """Fill in the fields of a `SkipVisionConfig` that were left out; `UserError` for values that do not fit together.

    The bounds are half and twice the average, and at least one token is skipped.
    """
    if skip.num_retained != AUTO:
        _refuse_fields(skip)
        return
    skip.retained_mean = DEFAULT_MEAN if skip.retained_mean is None else skip.retained_mean
    _check_count("retained_mean", skip.retained_mean)
    mean = skip.retained_mean
    skip.retained_min = max(1, mean // 2) if skip.retained_min is None else skip.retained_min
    if skip.retained_max is None:
        skip.retained_max = max(mean, min(2 * mean, mean + skip.num_skipped - 1)) if skip.merge else 2 * mean
    for name in ("retained_min", "retained_max"):
        _check_count(name, getattr(skip, name))
    if not skip.retained_min <= mean <= skip.retained_max:
        raise UserError(
            f"skip_vision: retained_mean {mean} does not lie within retained_min {skip.retained_min} and retained_max "
            f"{skip.retained_max}; change one of them"
        )
    if skip.merge and skip.retained_max >= mean + skip.num_skipped:
        raise UserError(
            f"skip_vision: retained_max {skip.retained_max} leaves nothing to skip of the {mean + skip.num_skipped} "
            f"tokens of an image (retained_mean {mean} + num_skipped {skip.num_skipped}); lower it"
        )
    threshold = skip.retained_threshold
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and 0 < threshold < 1):
        raise UserError(f"skip_vision.retained_threshold: expected a share between 0 and 1, got {threshold!r}")


def check_most(skip: Any, most: int, what: str) -> None:
    """`UserError` where `retained_max` is more than `most`, what an image can retain of its tokens (`what`)."""
    if skip.adaptive and skip.retained_max > most:
        raise UserError(
            f"skip_vision: retained_max {skip.retained_max} is more than {most}, the most of {what}; lower it"
        )


def refuse_auto(skip: Any, family: str) -> None:
    """`UserError` for a family that retains whole scales."""
    if skip is not None and skip.adaptive:
        raise UserError(
            f"skip_vision.num_retained: 'auto' chooses among patches, and family {family!r} retains whole scales; "
            "give a number"
        )


def within_patches(block: dict[str, Any], most: int) -> dict[str, Any]:
    """An `auto` block whose upper bound, where none is given and twice the average is more, is the `most` that an image
    can retain."""
    mean, skipped = block.get("retained_mean"), block.get("num_skipped")
    if block.get("retained_max") is not None or not isinstance(mean, int) or not mean <= most < 2 * mean:
        return block
    if block.get("merge", True):
        if not isinstance(skipped, int):
            return block
        most = min(most, mean + skipped - 1)
    return {**block, "retained_max": max(mean, most)}


def open_yet(block: dict[str, Any]) -> tuple[str, ...]:
    """Bounds of `auto` that cannot be judged by a block alone: the family brings the average or Ns that it lacks."""
    known = block.get("num_retained") != AUTO or {"retained_mean", "num_skipped"} <= block.keys()
    return () if known else ("retained_min", "retained_max")


def over(block: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A `skip_vision` block with the settings `given` put over it.

    A number for `num_retained` drops what belonged to `auto`; another average drops its bounds; a threshold that was
    found for another choice is dropped, to be found anew.
    """
    dropped: set[str] = set()
    if given.get("num_retained", AUTO) != AUTO:
        dropped |= set(FIELDS)
    if given.get("retained_mean", block.get("retained_mean")) != block.get("retained_mean"):
        dropped |= {"retained_min", "retained_max"}
    if any(given.get(name, block.get(name)) != block.get(name) for name in ("selection", *FIELDS[:3])):
        dropped.add("retained_threshold")
    return {**{name: value for name, value in block.items() if name not in dropped}, **given}


def _refuse_fields(skip: Any) -> None:
    for name in FIELDS:
        if getattr(skip, name) is not None:
            raise UserError(f"skip_vision.{name} goes with num_retained 'auto', not with {skip.num_retained}; drop it")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"skip_vision.{name}: expected a whole number of 1 or more, got {value!r}")
