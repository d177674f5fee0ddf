"""The card's section on measured speed: answers timed by `llava-sv eval --timing` and `llava_sv.eval.timing`, steps
and answers timed by `llava-sv bench train|infer`. Prefill, decode and end to end stand apart.

Reports arrive; markdown leaves. Called by `card`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.token_counts import count_tokens
from llava_sv.release.card_budgets import is_tradeoff
from llava_sv.release.card_eval import Own, environment_of, held_against
from llava_sv.release.card_format import (
    NOT_RECORDED,
    Book,
    count,
    interval,
    mapping,
    milliseconds,
    numeric,
    percent,
    plain,
    ratio,
    size_of,
    table,
)
from llava_sv.release.card_sources import Report, named, read_object

MADE_BY = "llava-sv bench train|infer --json FILE, or python -m llava_sv.eval.timing"
HEAD = ("", "dense", "this model", "this / dense")
OF_DENSE = ("", "this model, dense", "Skip-Vision", "Skip-Vision / this")
"""Heads of a table, on the card of a skipping model, and of a dense one."""
ALONE = ("", "this model")
PAIR = ("", "dense", "Skip-Vision", "Skip-Vision / dense")
"""Of `bench`, whose models are neither."""


def read_speeds(paths: Sequence[Path]) -> list[tuple[str, Report]]:
    """(kind, report): `timing`, `infer`, `train` or `budgets`. `UserError` for what is none of them."""
    return [
        (_kind(Path(path), values := read_object(Path(path), MADE_BY)), Report(Path(path), values)) for path in paths
    ]


def _check_family(report: Report, config: Any) -> None:
    """`UserError` for a measurement of another family."""
    measured = report.values.get("family")
    if measured != config.mm_family:
        raise UserError(f"{report.path}: was measured on family {measured}, this checkpoint is {config.mm_family}; "
                        f"measure that one (--family {config.mm_family})")  # fmt: skip


def _budget_note(report: Report, config: Any) -> list[str]:
    """Whether the budget that was measured is this checkpoint's."""
    settings = mapping(report.values, "settings", str(report.path))
    counts = count_tokens(config)
    own = (counts.retained, counts.skipped) if config.skip_vision is not None else None
    measured = (settings.get("num_retained"), settings.get("num_skipped"))
    if own is None or None in measured or own == measured:
        return []
    return [f"Measured at {measured[0]} retained and {measured[1]} skipped tokens; this checkpoint has {own[0]} and "
            f"{own[1]}.", ""]  # fmt: skip


def _kind(path: Path, values: dict[str, Any]) -> str:
    sides = [values.get(name) for name in ("dense", "skip")]
    if all(isinstance(side, dict) and "time_to_first_token_ms" in side for side in sides):
        return "timing"
    if is_tradeoff(values):
        return "budgets"
    regions = values.get("regions")
    if isinstance(regions, dict) and {"prefill", "decode", "end_to_end"} <= set(regions):
        return "infer"
    if isinstance(regions, dict) and {"llm", "model"} <= set(regions):
        return "train"
    if "paper_ratio" in values:
        raise UserError(
            f"{path}: is of llava-sv flops, which measures nothing; leave it out, a card counts FLOPs itself"
        )
    raise UserError(f"{path}: is no report of speed; give the JSON of {MADE_BY}")


def speed_section(
    speeds: list[tuple[str, Report]],
    evals: list[Report],
    dense: list[Report],
    checkpoint: Path,
    own: Own,
    config: Any,
    book: Book,
) -> list[str]:
    """All that was timed. config: the checkpoint's, which is the skipping one of a pair if it skips."""
    skips = config.skip_vision is not None
    lines: list[str] = []
    for kind, report in speeds:
        if kind == "timing":
            lines += _pair(report, checkpoint, own, skips, book)
        elif kind != "budgets":
            _check_family(report, config)
            lines += (_infer if kind == "infer" else _train)(report, config, book) + _budget_note(report, config)
    for report in evals:
        if report.values.get("timing"):
            lines += _alone(report, dense)
    if not lines:
        book.lacks("measured speed")
        return [f"Measured speed against dense: {NOT_RECORDED}.", ""]
    return lines


def _compared(rows: Sequence[tuple[Any, ...]], head: tuple[str, ...] = HEAD) -> list[str]:
    """A table: (what, dense, this model, how to write them). head `ALONE`: this model's figures only."""
    if head == ALONE:
        return table(head, [(what, "-" if after is None else write(after)) for what, _, after, write in rows])
    cells = []
    for what, before, after, write in rows:
        share = ratio(after / before) if before and after is not None else "-"
        cells.append((what, *("-" if value is None else write(value) for value in (before, after)), share))
    return table(head, cells)


REGIONS = {"llm": "decoder", "model": "whole model", "end_to_end": "end to end"}

ANSWER = (
    ("time to first token (image, prefill)", "time_to_first_token_ms", milliseconds),
    ("each further token (decode)", "decode_ms_per_token", milliseconds),
    ("KV cache after prefill", "kv_bytes_prefill", size_of),
    ("KV cache while decoding", "kv_bytes", size_of),
    ("prompt with visual tokens", "prompt_tokens", count),
)


def _answer_rows(before: dict[str, Any], after: dict[str, Any], where: str) -> list[tuple]:
    """Rows of two `eval.timing` blocks, the end to end of their answer among them."""
    rows = [(what, *(numeric(side, key, where) for side in (before, after)), write) for what, key, write in ANSWER]
    tokens = numeric(after, "new_tokens", where)
    if tokens:
        whole = [_end_to_end(side, tokens, where) for side in (before, after)]
        rows.insert(2, (f"an answer of {count(tokens)} tokens, end to end (added up)", *whole, milliseconds))
    return rows


def _end_to_end(side: dict[str, Any], tokens: float, where: str) -> float | None:
    first, further = (numeric(side, key, where) for key in ("time_to_first_token_ms", "decode_ms_per_token"))
    return None if first is None or further is None else first + (tokens - 1) * further


def _pair(report: Report, checkpoint: Path, own: Own, skips: bool, book: Book) -> list[str]:
    """`llava_sv.eval.timing`: two checkpoints that took turns."""
    values, where = report.values, str(report.path)
    told = mapping(mapping(values, "checkpoints", where), "skip" if skips else "dense", where)
    known = "whether this checkpoint is one of the two cannot be told: the report does not name them"
    if told:
        known = "whether it is this checkpoint: " + held_against(
            report.path, told.get("model_path"), told, checkpoint, own
        )
    side = mapping(values, "skip", where)
    env = mapping(values, "environment", where)
    if not env:
        book.lacks(f"environment of the timing ({named(report.path)})")
    return [
        "### Answers, dense and skipping side by side",
        "",
        f"Medians of {plain(side.get('repeats'))} runs on each of {plain(side.get('samples'))} questions, one at a "
        f"time, both checkpoints taking turns ({known}).",
        "",
        *_compared(_answer_rows(mapping(values, "dense", where), side, where), HEAD if skips else OF_DENSE),
        f"On: {environment_of(env) if env else NOT_RECORDED}.",
        "",
    ]


def _alone(report: Report, dense: list[Report]) -> list[str]:
    """`llava-sv eval --timing`: this checkpoint alone, or beside a control timed in a run of its own."""
    where = str(report.path)
    timing = mapping(report.values, "timing", where)
    other = next(
        (one for one in dense if one.values["task"] == report.values["task"] and one.values.get("timing")), None
    )
    env = mapping(report.values, "environment", where)
    apart = "" if other is None else "; the dense control in a run of its own"
    if other is not None and (differs := _differs(env, mapping(other.values, "environment", str(other.path)))):
        other, apart = None, f"; the dense control was timed with another {differs}, and is not compared"
    head = HEAD if other else ALONE
    return [
        f"### Answers to questions of {report.values['task']}",
        "",
        f"Medians of {plain(timing.get('repeats'))} runs on each of {plain(timing.get('samples'))} questions{apart}.",
        "",
        *_compared(_answer_rows(mapping(other.values, "timing", where) if other else {}, timing, where), head),
        f"On: {environment_of(env) if env else NOT_RECORDED}.",
        "",
    ]


ALIKE = ("device", "cpu", "threads", "dtype", "attention")
"""Of an environment: times are compared only where these are the same."""


def _differs(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first of `ALIKE` in which two environments differ."""
    return next((name for name in ALIKE if one.get(name) != other.get(name)), None)


def _infer(report: Report, config: Any, book: Book) -> list[str]:
    """`llava-sv bench infer`."""
    values, where = report.values, str(report.path)
    sides = [mapping(values, name, where) for name in ("dense", "skip")]
    keys = (
        ("prefill (image and first token)", "prefill_ms", milliseconds),
        ("each further token (decode)", "decode_ms_per_token", milliseconds),
        (f"an answer of {plain(values.get('new_tokens'))} tokens, end to end", "end_to_end_ms", milliseconds),
        ("KV cache while decoding", "kv_bytes", size_of),
        ("peak memory", "peak_bytes", size_of),
    )
    rows = [(what, *(numeric(side, key, where) for side in sides), write) for what, key, write in keys]
    return [*_head(report, "Answers", config), *_compared(rows, PAIR), *_saved(report), *_below(report, book)]


def _train(report: Report, config: Any, book: Book) -> list[str]:
    """`llava-sv bench train`."""
    where = str(report.path)
    lines = _head(report, "Training steps", config)
    rows = []
    for region, name in (("llm", "decoder"), ("model", "whole model")):
        found = mapping(mapping(report.values, "regions", where), region, where)
        sides = [mapping(found, side, where) for side in ("dense", "skip")]
        for what, key, write in (("step", "step_ms", milliseconds), ("peak memory", "peak_bytes", size_of)):
            rows.append((f"{what}, {name}", *(numeric(side, key, where) for side in sides), write))
    return [*lines, *_compared(rows, PAIR), *_saved(report), *_below(report, book)]


def _head(report: Report, what: str, config: Any) -> list[str]:
    values, settings = report.values, mapping(report.values, "settings", str(report.path))
    layers, whole = (numeric(values, name, str(report.path)) for name in ("layers", "all_layers"))
    part = f" ({count(layers)} of its {count(whole)} decoder layers)" if layers and whole and layers != whole else ""
    asked = ", ".join(f"{name} {plain(settings[name])}" for name in sorted(settings))
    return [
        f"### {what} at size {plain(values.get('size'))}, family {plain(values.get('family'))}",
        "",
        f"Random weights of that size{part}, the same for both, not this checkpoint's, which has "
        f"{config.num_hidden_layers} decoder layers of width {count(config.hidden_size)}: speed depends on sizes "
        f"alone. Settings: {asked or NOT_RECORDED}.",
        "",
    ]


def _saved(report: Report) -> list[str]:
    """What was saved, with quartiles over rounds."""
    rows = []
    for region, found in mapping(report.values, "regions", str(report.path)).items():
        quartiles = found.get("time_saved_quartiles")
        spread = interval(*quartiles) if quartiles else "-"
        shares = [numeric(found, key, str(report.path)) for key in ("time_saved", "flops_saved")]
        rows.append((REGIONS.get(region, region), *("-" if s is None else percent(s) for s in shares), spread))
    return table(("region", "time saved", "FLOPs saved", "quartiles of the time saved"), rows)


def _below(report: Report, book: Book) -> list[str]:
    found = mapping(report.values, "environment", str(report.path))
    if not found:
        book.lacks(f"environment of the measurement ({named(report.path)})")
    return [f"On: {environment_of(found) if found else NOT_RECORDED}.", ""]
