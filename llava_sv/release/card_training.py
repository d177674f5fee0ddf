"""The card's sections on training: what the run says of itself, its data with licences and contamination, its settings.

A `Run`, its pretraining run and the data's manifest arrive; markdown and the loss curve's PNG leave. Called by `card`.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from llava_sv.release.card_format import (
    NOT_RECORDED,
    Book,
    count,
    hours,
    listed,
    loss,
    mapping,
    mean,
    number,
    numeric,
    percent,
    plain,
    seconds,
    short,
    size_of,
    table,
)
from llava_sv.release.card_sources import CardFile, Run
from llava_sv.train.metrics import draw_loss

LAST = 20
"""Logged steps whose mean is called the final loss."""

PICTURE = "loss.png"


def stage_of(run: Run) -> str | None:
    """What the run trained, in words; None where its settings are not recorded."""
    settings = run.settings
    if "tune_mm_mlp_adapter" not in settings:
        return None
    if settings["tune_mm_mlp_adapter"]:
        return "pretraining: the projector alone"
    parts = []
    if settings.get("lora"):
        parts.append("LoRA adapters of the language model")
    elif not settings.get("freeze_backbone"):
        parts.append("the language model")
    if not settings.get("freeze_mm_mlp_adapter"):
        parts.append("the projector with its summaries" if settings.get("skip_vision") else "the projector")
    if settings.get("unfreeze_mm_vision_tower"):
        parts.append("the encoder")
    return "fine-tuning: " + listed(parts)


def final_loss(run: Run) -> tuple[float, int] | None:
    """(mean of the last logged losses, how many they are); None without metrics."""
    last = [value for _, value in run.losses][-LAST:]
    return (sum(last) / len(last), len(last)) if last else None


def device_hours(run: Run) -> float | None:
    """Hours times devices over all of the run's starts; of an older run, those of the last number of processes."""
    recorded = numeric(run.record, "device_hours", run.where)
    if recorded is not None or "device_hours" in run.record:
        return recorded
    took, world = (numeric(run.summary, name, run.where) for name in ("train_seconds", "world_size"))
    return None if took is None or world is None else took * world / 3600


def training_section(run: Run, pretrain: Run | None, card_file: CardFile, book: Book) -> list[str]:
    """The stages, one column each, then the loss curve."""
    runs = [run] if pretrain is None else [pretrain, run]
    columns = [_figures(one, card_file if one is run else CardFile(), book, one is run) for one in runs]
    names = list(columns[0])
    head = ["", "this run"] if pretrain is None else ["", "pretraining", "this run"]
    lines = table(head, [(name, *(column[name] for column in columns)) for name in names])
    lines += _notes(run, pretrain)
    if pretrain is None and run.settings.get("pretrain_mm_mlp_adapter"):
        began = short(str(run.settings["pretrain_mm_mlp_adapter"]))
        lines += [f"The projector began as `{began}`; how that was pretrained is not part of this card.", ""]
        book.lacks("the pretraining run")
    if not run.losses:
        book.lacks("loss curve (metrics.jsonl)")
        return [*lines, f"Loss curve: {NOT_RECORDED}.", ""]
    return [*lines, f"![training loss by step]({PICTURE})", ""]


def _figures(run: Run, card_file: CardFile, book: Book, main: bool) -> dict[str, str]:
    """Row -> text, of one run."""
    stage = "" if main else "pretraining: "

    def say(what: str, value: Any, write: Any = str) -> str:
        return book.say(stage + what, value, write)

    def figure(name: str) -> float | None:
        return numeric(run.summary, name, run.where)

    last, settings = final_loss(run), run.settings
    wasted, problems = figure("skipped_steps"), mapping(run.summary, "image_problems", run.where)
    steps = run.step if run.step is not None else figure("steps")
    return {
        "What trained": say("stage", stage_of(run)),
        "Steps": say("steps", steps, count),
        "Samples": say("samples", figure("samples"), count),
        "Epochs": say("epochs", run.rows[-1].get("epoch") if run.rows else None, number),
        "Data": say("data", settings.get("data_path"), lambda path: f"`{short(str(path))}`"),
        "Learning rate": say("learning rate", numeric(settings, "learning_rate", run.where), number),
        "Batch": say("batch", numeric(run.settings, "batch", run.where), count),
        "Time": say("time", figure("train_seconds"), seconds),
        "Devices x hours": say("device hours", device_hours(run), hours),
        "Processes": say("processes", figure("world_size"), count),
        "Hardware": say("hardware", hardware_of(run, card_file)),
        "Versions": say("versions", versions_of(run)),
        "Code": say("commit of the code", commit_of(run)),
        "Began, ended": say("dates", dates_of(run)),
        "Final loss": say(
            "final loss", None if last is None else f"{loss(last[0])} (mean of the last {last[1]} logged)"
        ),
        "Loss over the whole run": say("mean loss", figure("train_loss"), loss),
        "Throughput": say("throughput", throughput_of(run)),
        "Waiting for data": say("waiting for data", figure("data_wait_share"), percent),
        "FLOPs over dense": say("FLOPs over dense", figure("dense_flops_share"), percent),
        "Steps dropped for numbers that were not finite": say("dropped steps", wasted, count),
        "Images that could not be read": say("image problems", _problems(problems)),
        "LoRA": plain(run.settings["lora"]) if run.settings.get("lora") else "no" if run.settings else NOT_RECORDED,
    }


def _problems(problems: dict[str, Any]) -> str | None:
    return ", ".join(f"{plain(value)} {name}" for name, value in sorted(problems.items())) or None


def throughput_of(run: Run) -> str | None:
    """Medians over the logged steps but the first, which warms up."""
    rows = run.rows[1:] or run.rows
    said = []
    for name, unit in (("samples_per_second", "samples/s"), ("tokens_per_second", "tokens/s")):
        values = sorted(row[name] for row in rows if row.get(name) is not None)
        if values:
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            said.append(f"{mean(middle)} {unit}")
    took, samples = (numeric(run.summary, name, run.where) for name in ("train_seconds", "samples"))
    whole = f"; over the whole run {mean(samples / took)} samples/s" if took and samples and run.step is None else ""
    return ", ".join(said) + f" (median of the logged steps){whole}" if said else None


def hardware_of(run: Run, card_file: CardFile) -> str | None:
    """As recorded; what the card file says where nothing is."""
    recorded = mapping(run.record, "hardware", run.where)
    if not recorded:
        return card_file.hardware and f"{card_file.hardware} (as its authors say)"
    devices = [
        f"{one['count']} x {one['name']}"
        + (f", {size_of(one['memory_bytes'])} each" if one.get("memory_bytes") else "")
        for one in recorded.get("devices") or []
    ]
    nodes, processor = recorded.get("nodes"), recorded.get("cpu")
    if nodes and nodes > 1:
        devices.append(f"{nodes} nodes")
    if processor:
        cores, memory = recorded.get("cpu_count"), recorded.get("memory_bytes")
        more = [*([f"{cores} cores"] if cores else []), *([f"{size_of(memory)} memory"] if memory else [])]
        devices.append(", ".join([f"CPU {processor}", *more]))
    return "; ".join(devices) or None


def versions_of(run: Run) -> str | None:
    """As recorded."""
    found = mapping(run.record, "versions", run.where)
    return ", ".join(f"{name} {version}" for name, version in found.items() if version) or None


def commit_of(run: Run) -> str | None:
    """The code's commit, with a word where it had been changed."""
    found = mapping(run.record, "code", run.where)
    if not found.get("commit"):
        return None
    return str(found["commit"])[:12] + (" with changes that were not committed" if found.get("changed") else "")


def dates_of(run: Run) -> str | None:
    """As recorded, in UTC; starts over resumes beside."""
    began, ended = run.record.get("started_utc"), run.record.get("ended_utc")
    if not began:
        return None
    starts = run.record.get("starts")
    again = f", {len(starts)} starts" if isinstance(starts, list) and len(starts) > 1 else ""
    return f"{began} to {ended or NOT_RECORDED} UTC{again}"


def _notes(run: Run, pretrain: Run | None) -> list[str]:
    """Which checkpoint of the run this is, and whether the pretraining run is the one that the run names."""
    lines = []
    best = run.summary.get("best_checkpoint")
    if run.step is not None:
        lines.append(f"This is the checkpoint of step {count(run.step)} of that run; figures of time are the run's.")
    if best:
        name, value = run.summary.get("best_metric_name"), numeric(run.summary, "best_metric", run.where)
        lines.append(f"The run's best checkpoint is `{best}`: {name} {number(value) if value is not None else '-'}.")
    began = run.settings.get("pretrain_mm_mlp_adapter")
    if pretrain is not None and began and Path(str(began)).parent.name != pretrain.folder.resolve().name:
        lines.append(
            f"The run's settings name its projector as `{short(str(began))}`; the pretraining run given here lies in "
            f"`{pretrain.folder.name}`: whether they are the same cannot be told."
        )
    return [line for one in lines for line in (one, "")]


def loss_picture(run: Run) -> bytes | None:
    """The loss curve as a PNG, drawn from metrics.jsonl; None where no loss was logged."""
    finite = [row for row in run.rows if row.get("loss") is None or math.isfinite(row["loss"])]
    if not run.losses:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        draw_loss(finite, path)
        return path.read_bytes()


def settings_section(run: Run, book: Book) -> list[str]:
    """All settings of the run, and the flags that differ from their defaults."""
    if not run.settings:
        book.lacks("settings of the run (train_summary.json)")
        return [f"Settings: {NOT_RECORDED}.", ""]
    kept = {
        name: value for name, value in run.settings.items() if name not in ("family", "data_content", "exact_lengths")
    }
    kept |= {f"family: {name}": value for name, value in (run.settings.get("family") or {}).items()}
    lines = table(("setting", "value"), [(f"`{name}`", plain(value)) for name, value in sorted(kept.items())])
    flags = mapping(run.record, "flags", run.where)
    if not flags:
        book.lacks("flags of the run that differ from their defaults")
        return lines
    more = [(f"`--{name}`", plain(value)) for name, value in sorted(flags.items()) if name not in kept]
    return (
        [*lines, "Further flags that differ from their defaults:", "", *table(("flag", "value"), more)]
        if more
        else lines
    )
