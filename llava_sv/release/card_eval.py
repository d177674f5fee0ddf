"""The card's section on evaluation: tables of `llava-sv eval --json` reports, a dense control beside, fine detail; and
the hub's `model-index`.

Reports arrive, held against the checkpoint first; markdown and plain values leave. Called by `card`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError
from llava_sv.release.card_format import (
    NOT_RECORDED,
    Book,
    count,
    interval,
    listed,
    mapping,
    mean,
    numeric,
    percent,
    plain,
    points,
    short,
    table,
)
from llava_sv.release.card_sources import Report, named, read_report

MADE_BY = "llava-sv eval --json FILE"
NEEDED = ("task", "model_path", "accuracy", "per_category", "questions")

FINE = ("fine_detail", "text", "small_text", "ocr", "small_object", "count")
"""Categories that fine detail decides, the plainest first."""

Z = 1.959963984540054
"""Of the normal distribution, for 95%."""


Own = Sequence[dict[str, str]]
"""Fingerprints (`eval.identity`) of the checkpoint that a card is of; several where a release is stored otherwise."""


def read_reports(paths: Sequence[Path]) -> list[Report]:
    """Evaluations, their numbers checked."""
    reports = []
    for path in paths:
        report = read_report(Path(path), MADE_BY, NEEDED)
        where = str(path)
        shares = {"accuracy": numeric(report.values, "accuracy", where)}
        per = mapping(report.values, "per_category", where)
        shares |= {f"per_category.{name}": numeric(per, name, f"{where}: per_category") for name in per}
        for name, share in shares.items():
            if share is None or not 0 <= share <= 1:
                raise UserError(f"{where}: {name} is {share}, not a share between 0 and 1; evaluate again")
        questions = numeric(report.values, "questions", where)
        if not questions or questions < 1:
            raise UserError(f"{where}: questions is {questions}, not a number of questions; evaluate again")
        reports.append(report)
    titles: dict[str, Path] = {}
    for report in reports:
        title = title_of(report)
        if title in titles:
            raise UserError(f"{report.path}: is of {title}, as {titles[title]} is; give one of the two")
        titles[title] = report.path
    return reports


def asked_of(report: Report) -> dict[str, int]:
    """Category -> questions: as recorded, or counted in the answers beside an older report, where they are whole."""
    recorded = mapping(report.values, "questions_per_category", str(report.path))
    answers = report.path.with_suffix(".answers.jsonl")
    if recorded or not answers.is_file():
        return recorded
    try:
        lines = answers.read_text(encoding="utf-8").splitlines()
        found = Counter(str(json.loads(line)["category"]) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{answers}: is not a file of answers ({error}); evaluate again ({MADE_BY})") from error
    whole = sum(found.values()) == report.values["questions"] and set(found) == set(report.values["per_category"])
    return dict(found) if whole else {}


def check_own(report: Report, checkpoint: Path, own: Own) -> str:
    """How a report is known to be of this checkpoint, in words. `UserError` where it is of another one."""
    return held_against(report.path, report.values["model_path"], report.values.get("checkpoint"), checkpoint, own)


def held_against(path: Path, model_path: Any, recorded: dict[str, str] | None, checkpoint: Path, own: Own) -> str:
    """The same for any report: the path and the identity (`eval.identity`) that it recorded."""
    mend = f"evaluate this one ({MADE_BY})"
    if recorded and recorded.get("weights") and own:
        known = {part: [one[part] for one in own] for part in ("weights", "settings")}
        for part, what in (("weights", "other weights"), ("settings", "other settings in config.json")):
            if recorded.get(part) not in known[part]:
                raise UserError(
                    f"{path}: is a report of another checkpoint than {checkpoint}: {what} (recorded "
                    f"{str(recorded.get(part))[:12]}, here {known[part][0][:12]}; it names {model_path}); {mend}"
                )
        return "yes, by its fingerprint"
    other = Path(str(model_path)).name
    if other != checkpoint.resolve().name:
        raise UserError(
            f"{path}: is a report of {model_path}, without a fingerprint, and the name is not {checkpoint}'s; {mend}"
        )
    return "by the folder's name only: the report holds no fingerprint"


def wilson(share: float, questions: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `questions` answers."""
    square = Z * Z / questions
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / questions + square / (4 * questions))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluation_section(reports: list[Report], dense: list[Report], checkpoint: Path, own: Own, book: Book) -> list[str]:
    """A table of each report, its settings, and how it is known to be of this checkpoint."""
    if not reports:
        book.lacks("evaluation (llava-sv eval --json)")
        return [f"Evaluation: {NOT_RECORDED}.", ""]
    for one in dense:
        if one.values.get("checkpoint") in own:
            raise UserError(f"{one.path}: is of this checkpoint itself, not of a dense control; give it as its own")
    lines: list[str] = []
    for report in reports:
        known = check_own(report, checkpoint, own)
        control = _control(report, dense)
        lines += [
            f"### {title_of(report)}",
            "",
            *_accuracies(report, control, book),
            *_settings(report, known, control, book),
        ]
    return lines


def title_of(report: Report) -> str:
    """The benchmark's name, and what was unusual."""
    values = report.values
    limit, level = numeric(values, "limit", str(report.path)), values.get("skip_kv")
    first = f", the first {count(limit)} questions" if limit else ""
    blind = ", asked without the image" if values.get("blind") else ""
    return str(values["task"]) + first + blind + (f", skip KV-cache level {level}" if level else "")


def _control(report: Report, dense: list[Report]) -> Report | None:
    """The dense report on the same benchmark; `UserError` where its questions were others."""
    alike = [one for one in dense if one.values["task"] == report.values["task"]
             and bool(one.values.get("blind")) == bool(report.values.get("blind"))]  # fmt: skip
    for one in alike:
        asked = [(each.values.get("questions"), each.values.get("questions_sha256")) for each in (one, report)]
        if asked[0][0] != asked[1][0] or (None not in (asked[0][1], asked[1][1]) and asked[0][1] != asked[1][1]):
            raise UserError(f"{one.path}: was asked other questions than {report.path}; evaluate both on the same data")
    return alike[0] if alike else None


def _accuracies(report: Report, control: Report | None, book: Book) -> list[str]:
    values = report.values
    numbers = asked_of(report)
    chance = mapping(values, "chance", str(report.path))
    by_chance = mapping(chance, "per_category", f"{report.path}: chance")
    head = [
        "category",
        "questions",
        "accuracy",
        "95% interval (Wilson)",
        *(["dense control"] if control else []),
        "chance",
    ]
    rows = []
    for category, share in values["per_category"].items():
        asked = numeric(numbers, category, f"{report.path}: questions_per_category")
        beside = control.values["per_category"].get(category) if control else None
        rows.append(
            _row(category, asked, share, beside, control is not None, numeric(by_chance, category, str(report.path)))
        )
    if not numbers:
        book.lacks(f"questions of each category ({named(report.path)})")
    beside = control.values["accuracy"] if control else None
    whole = _row("all", values["questions"], values["accuracy"], beside, control is not None,
                 numeric(chance, "accuracy", str(report.path)))  # fmt: skip
    return table(head, [*rows, [f"**{text}**" for text in whole]])


def _row(
    name: str, asked: float | None, share: float, beside: float | None, with_control: bool, chance: float | None
) -> list[str]:
    row = [name, NOT_RECORDED if asked is None else count(asked), percent(share)]
    row.append("-" if not asked else interval(*wilson(share, asked)))
    row += [percent(beside) if beside is not None else "-"] if with_control else []
    return [*row, "-" if chance is None else percent(chance)]


def _settings(report: Report, known: str, control: Report | None, book: Book) -> list[str]:
    values, made = report.values, mapping(report.values, "generation", str(report.path))
    if not made:
        book.lacks(f"generation settings ({named(report.path)})")
    level = made.get("skip_kv") or values.get("skip_kv") or "the checkpoint's own"
    how = "sampled" if made.get("do_sample") else "greedy"
    answers = (
        f"{how}, at most {plain(made.get('max_new_tokens'))} new tokens, batches of "
        f"{plain(made.get('batch_size'))}" + (", quantised weights" if made.get("quantized") else "")
        if made
        else NOT_RECORDED
    )
    rows = [
        ("Of this checkpoint", known),
        ("Skip KV-cache level", str(level)),
        ("Answers", answers),
        ("On", _environment(values, report, book)),
        ("Questions' sha256", str(values.get("questions_sha256") or NOT_RECORDED)[:12]),
    ]
    if values.get("retained"):
        kept = mapping(values, "retained", str(report.path))
        rows.append(
            ("Retained tokens an image", f"{mean(kept['mean'])} on average ({kept['least']} to {kept['most']})")
        )
    if control:
        other = _otherwise(report, control)
        apart = f"; otherwise than this one: {listed(other)}" if other else ""
        rows.append(("Dense control", f"`{short(str(control.values['model_path']))}`, asked the same benchmark{apart}"))
    return table(("", ""), rows)


def _otherwise(report: Report, control: Report) -> list[str]:
    """In what a control was asked otherwise, as far as both recorded it, that may change its answers."""
    found = []
    for part, names in (("generation", ("do_sample", "max_new_tokens", "quantized")), ("environment", ("dtype",))):
        here, there = (mapping(one.values, part, str(one.path)) for one in (report, control))
        found += [
            f"{name} {plain(there[name])}"
            for name in names
            if name in here and name in there and here[name] != there[name]
        ]
    return found


def _environment(values: dict[str, Any], report: Report, book: Book) -> str:
    found = mapping(values, "environment", str(report.path))
    if not found:
        book.lacks(f"environment of the evaluation ({named(report.path)})")
        return NOT_RECORDED
    return environment_of(found)


def environment_of(found: dict[str, Any]) -> str:
    """`bench.clock.environment` in one line."""
    return ", ".join(f"{name} {plain(value)}" for name, value in found.items())


def fine_detail(reports: list[Report], dense: list[Report]) -> list[str]:
    """The weak spot in the run's own numbers; no line where no report has such a category."""
    lines = []
    for report in reports:
        if report.values.get("blind"):
            continue
        control = _control(report, dense)
        lines += [line for name in FINE if (line := _fine_line(report, control, name))]
    return lines


def _fine_line(report: Report, control: Report | None, category: str) -> str | None:
    """One category's figure; None where there is none, or where it is no weak spot of this checkpoint."""
    values = report.values
    share, all_of_them = values["per_category"].get(category), values["accuracy"]
    other = control.values["per_category"].get(category) if control else None
    weak = share is not None and (share < all_of_them or (other is not None and share < other))
    if share is None or not (weak or category == FINE[0]):
        return None
    asked = numeric(asked_of(report), category, str(report.path))
    chance = numeric(mapping(mapping(values, "chance", ""), "per_category", ""), category, str(report.path))
    beside = [f"all categories: {percent(all_of_them)}"]
    beside += [f"95% interval {interval(*wilson(share, asked))}"] if asked else []
    beside += [f"chance: {percent(chance)}"] if chance is not None else []
    line = f"- {values['task']}, `{category}`: {percent(share)} ({'; '.join(beside)})"
    if other is None:
        return line
    line += f"; the dense control {percent(other)}, a difference of {points(share - other)}"
    low, high = wilson(share, asked) if asked else (share, share)
    return f"{line}, less than this number of questions can tell" if low < other < high else line


def model_index(name: str, reports: list[Report]) -> list[dict[str, Any]]:
    """The hub's `model-index`: accuracies as shares, each benchmark once, those asked without images left out."""
    results = []
    for report in reports:
        values = report.values
        if values.get("blind"):
            continue
        metrics = [{"type": "accuracy", "value": round(values["accuracy"], 6), "name": "accuracy"}]
        for category, share in values["per_category"].items():
            metrics.append({"type": "accuracy", "value": round(share, 6), "name": f"accuracy, {category}"})
        results.append(
            {
                "task": {"type": "image-text-to-text", "name": "Visual question answering"},
                "dataset": {"type": str(values["task"]), "name": title_of(report)},
                "metrics": metrics,
            }
        )
    return [{"name": name, "results": results}] if results else []
