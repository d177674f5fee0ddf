"""The files that a model card is made from, read and checked: the run, reports, the data's manifest, the card file.

Paths arrive, plain values leave. A file that is not what it should be is a `UserError` that names file and line.
Called by `card`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llava_sv.data.plain_yaml import read_yaml
from llava_sv.errors import UserError
from llava_sv.files import read_json, sha256_of
from llava_sv.release.card_format import numeric, short
from llava_sv.train.checkpoint import MARKER, SUMMARY

METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"
PARTS_OF_RUNS = ("best",)
"""Folders in a run's OUTPUT that are checkpoints of it, beside `checkpoint-N`."""


@dataclass
class Run:
    """What a training left behind. step: where the checkpoint is one of several of the run, None for its end."""

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int | None = None

    @property
    def where(self) -> str:
        """Of the summary, for messages."""
        return str(self.folder / SUMMARY)

    @property
    def settings(self) -> dict[str, Any]:
        return self.summary.get("settings") or {}

    @property
    def record(self) -> dict[str, Any]:
        """What the run noted of machine, versions and data (`train.run_record`)."""
        return self.summary.get("record") or {}

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every logged step whose loss was finite."""
        return [(row["step"], row["loss"]) for row in self.rows if row.get("loss") is not None]


@dataclass
class Report:
    """A JSON report and where it came from."""

    path: Path
    values: dict[str, Any]


@dataclass(frozen=True)
class CardFile:
    """What no file of a run knows, and its authors do."""

    license: str | None = None
    """An identifier of the hub, or a name."""
    license_link: str | None = None
    authors: tuple[str, ...] = ()
    base_licenses: dict[str, str] = field(default_factory=dict)
    """Name of a base model or data set -> its licence."""
    intended_use: str | None = None
    out_of_scope: str | None = None
    limitations: str | None = None
    hardware: str | None = None
    """Where the run did not record it."""
    notes: str | None = None
    citation: str | None = None
    homepage: str | None = None
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    """Data sets on the hub, organisation/name."""
    pretraining_data: str | None = None


def read_run(checkpoint: Path) -> Run:
    """The run that made `checkpoint`: its own folder, or the one above a `checkpoint-N` or `best`."""
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint}: no such folder; name one that training or converting wrote")
    folder, step = checkpoint, None
    inside = checkpoint.name.startswith("checkpoint-") or checkpoint.name in PARTS_OF_RUNS
    above = checkpoint.absolute().parent
    if not (checkpoint / SUMMARY).is_file() and inside and any((above / one).is_file() for one in (SUMMARY, METRICS)):
        folder = above
        step = _step_of(checkpoint.resolve())
    run = Run(folder, step=step)
    if (folder / SUMMARY).is_file():
        run.summary = read_object(folder / SUMMARY, "training")
        for name in ("settings", "record"):
            if not isinstance(run.summary.get(name) or {}, dict):
                raise UserError(f"{run.where}: {name} is not an object; take the file as it was written")
    elif (checkpoint / MARKER).is_file():  # of a run that is not finished
        marker = read_object(checkpoint / MARKER, "training")
        run.summary = {name: marker[name] for name in ("settings", "world_size") if marker.get(name)}
    if step is None and folder != checkpoint:
        found = numeric(run.summary, "best_step", run.where)
        run.step = None if found is None else int(found)
    if (folder / METRICS).is_file():
        run.rows = [row for row in read_lines(folder / METRICS) if run.step is None or row["step"] <= run.step]
    if run.rows and not (folder / SUMMARY).is_file() and run.step is not None:
        run.summary |= {"train_seconds": numeric(run.rows[-1], "seconds", str(folder / METRICS))}
    return run


def _step_of(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if folder.name.startswith("checkpoint-") and number.isdigit() else None


def read_object(path: Path, made_by: str) -> dict[str, Any]:
    """A JSON object."""
    values = read_json(path, made_by)
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; give the file that {made_by} writes")
    return values


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. `UserError` names the line that is broken; a last one that a killed run left torn is
    passed over."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (near byte {error.start}); take the file as it was") from error
    lines, whole = text.splitlines(), text.endswith("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not whole:
                break
            raise UserError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{where}: has no step; take the file as training wrote it")
        for name in ("loss", "eval_loss", "tokens_per_second", "samples_per_second"):
            numeric(row, name, where)
        rows.append(row)
    return rows


def read_report(path: Path, made_by: str, needed: tuple[str, ...]) -> Report:
    """A report with the fields `needed`."""
    values = read_object(path, made_by)
    lacking = [name for name in needed if name not in values]
    if lacking:
        raise UserError(f"{path}: no field {', '.join(lacking)}; give the JSON that {made_by} writes")
    return Report(path, values)


def find_manifest(given: Path | None, run: Run) -> Path | None:
    """The data's manifest: the one named, or the one in the run's own mixture folder; None where there is none."""
    if given is not None:
        return given / MANIFEST if given.is_dir() else given
    data = run.settings.get("data_path")
    if not isinstance(data, str):
        return None
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    found = folder / MANIFEST
    if not found.is_file():
        return None
    return found if read_object(found, "llava-sv data mix").get("kind") == "mixture" else None


def read_manifest(path: Path, run: Run) -> dict[str, Any]:
    """A mixture's manifest, its own sha256 in it. `UserError` for another file, and for other data than the run's."""
    values = read_object(path, "llava-sv data mix")
    if values.get("kind") != "mixture" or not isinstance(values.get("sources"), list):
        raise UserError(f"{path}: is not a mixture's manifest; give the manifest.json that llava-sv data mix writes")
    for source in values["sources"]:
        if not isinstance(source, dict) or "source" not in source:
            raise UserError(f"{path}: a source without a name; take the manifest as llava-sv data mix wrote it")
    digest = sha256_of(path)
    recorded = (run.record.get("data") or {}).get("manifest_sha256")
    if recorded is not None and recorded != digest:
        raise UserError(
            f"{path}: is not the manifest that the run was trained with (sha256 {digest[:12]}, recorded "
            f"{recorded[:12]}); give that one"
        )
    return {**values, "own_sha256": digest, "matches": recorded == digest if recorded else None}


def read_card_file(path: Path | None) -> CardFile:
    """The card file's fields. `UserError` for a key that is not known, and for a value of another kind."""
    if path is None:
        return CardFile()
    values = read_yaml(path)
    if values is None:
        return CardFile()
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a mapping; write lines such as `license: apache-2.0`")
    kinds = {one.name: str(one.type) for one in fields(CardFile)}
    unknown = [str(key) for key in values if key not in kinds]
    if unknown:
        raise UserError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(kinds)}")
    return CardFile(**{key: _of_kind(path, key, value, kinds[key]) for key, value in values.items()})


def _of_kind(path: Path, key: str, value: Any, kind: str) -> Any:
    if kind.startswith("tuple"):
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{path}: {key} is not a list of texts")
    if kind.startswith("dict"):
        if isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair):
            return value
        raise UserError(f"{path}: {key} is not a mapping of names to texts")
    if value is None or isinstance(value, str):
        return value.strip() if value else None
    raise UserError(f"{path}: {key} is {value!r}, not a text; put it between quotes")


def named(path: Path) -> str:
    """A file in the card: no path of a machine."""
    return short(str(path))
