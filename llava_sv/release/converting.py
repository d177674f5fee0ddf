"""One checkpoint from a layout to another: read as a `Plan`, written, read back, checked; then it takes its place.

`convert_checkpoint` is what `llava-sv convert SRC --to LAYOUT` does; it returns what was done. A folder appears whole
or not at all.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llava_sv.conversation import get_template
from llava_sv.errors import NoRoom, UserError
from llava_sv.release import kept, probe
from llava_sv.release.check_plan import check_plan
from llava_sv.release.folders import check_output, replacing_folder
from llava_sv.release.hf_names import style_of
from llava_sv.release.layouts import check_whole, layout_of
from llava_sv.release.plan import Plan
from llava_sv.release.skipping import drop_skipping, make_skipping
from llava_sv.release.weights import open_weights, torch_dtype

SIZES = ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
ENCODERS: dict[tuple[Any, ...], str] = {
    ("clip_vision_model", 1024, 24, 336, 14): "openai/clip-vit-large-patch14-336",
    ("clip_vision_model", 1024, 24, 224, 14): "openai/clip-vit-large-patch14",
    ("siglip_vision_model", 1152, 27, 384, 14): "google/siglip-so400m-patch14-384",
}
"""`SIZES` of published encoders -> their names."""


@dataclass
class Options:
    """What the command line says; see `release.convert`."""

    source: Path
    to: str
    out: Path
    force: bool = False
    dtype: str | None = None
    shard_bytes: int | None = None
    check: bool = True
    drop_skip: bool = False
    conv_template: str | None = None
    vision_tower: str | None = None
    base: str | None = None
    skip_vision: dict[str, Any] = field(default_factory=dict)


def convert_checkpoint(options: Options) -> dict[str, Any]:
    """Write `options.out`; returns a report that JSON can hold. Raises `UserError`; then nothing is left behind."""
    layout = layout_of(options.source)
    _check_options(options, layout)
    if options.out.resolve().is_relative_to(options.source.resolve()):
        raise UserError(f"--out {options.out}: is or lies in the source {options.source}; choose another folder")
    needed = {"the source": str(options.source), "the current folder": "."}
    check_output(options.out, needed, options.force, "--out")
    plan = _read(options, layout)
    now = kept.print_of(plan)
    changed = _changed(plan, options)
    check_plan(changed)
    with replacing_folder(options.out) as folder:
        try:
            return _make(plan, changed, now, options, folder)
        except UserError as error:  # what the result is called is not where it is being made
            kind = NoRoom if isinstance(error, NoRoom) else UserError
            raise kind(str(error).replace(str(folder), f"of the result {options.out}")) from error


def _check_options(options: Options, layout: str) -> None:
    if options.conv_template is not None:
        get_template(options.conv_template)
    changes = options.dtype or options.shard_bytes or options.skip_vision or options.drop_skip or options.conv_template
    if layout == options.to and not (layout == "sv" and changes):
        mend = "; pass --dtype or --shard-size to write it anew" if layout == "sv" else ""
        raise UserError(f"{options.source}: is in layout {layout} already{mend}")
    if options.skip_vision and options.to != "sv":
        raise UserError(f"--to {options.to}: only this project's layout, sv, holds a model that skips; drop --sv_*")
    if options.skip_vision and options.drop_skip:
        raise UserError("--drop-skip and --sv_* contradict each other; drop one of them")
    if layout != "llava" and options.base:
        raise UserError(f"--base: {options.source} is whole; drop it")
    if "llava" not in (layout, options.to) and options.vision_tower:
        raise UserError(f"--vision-tower: {options.source} holds its encoder; drop it")


def _layout_module(kind: str, layout: str) -> Any:
    return importlib.import_module(f"llava_sv.release.{kind}_{layout}")


def _read(options: Options, layout: str) -> Plan:
    given: dict[str, Any] = {}
    if layout == "llava":
        given = {"vision_tower": options.vision_tower, "base": options.base}
    else:
        check_whole(options.source)
    return _layout_module("from", layout).read(options.source, **given)


def _changed(plan: Plan, options: Options) -> Plan:
    """The plan as the flags want it; `plan` itself where they want nothing."""
    made = replace(plan, config=dict(plan.config), notes=list(plan.notes))
    if options.drop_skip:
        if not plan.config.get("skip_vision"):
            raise UserError(f"--drop-skip: {options.source} skips nothing; drop the flag")
        made = drop_skipping(made)
    if options.skip_vision:
        made = make_skipping(made, options.skip_vision)
    if options.conv_template:
        made.config["conv_template"] = options.conv_template
        made.notes = [note for note in made.notes if not note.startswith("prompts:")]
    if options.dtype:
        made.config["dtype"] = options.dtype
    if options.to == "llava" and not made.config.get("mm_vision_tower"):
        before = kept.config_before(plan.source).get("mm_vision_tower")
        made.config["mm_vision_tower"] = options.vision_tower or before or _likely_encoder(made)
    return made


def _likely_encoder(plan: Plan) -> str | None:
    """The published encoder that has this one's sizes, which LLaVA's layout must name; said in a note."""
    vision = plan.config["vision_config"]
    name = ENCODERS.get(tuple(vision.get(field) for field in SIZES))
    if name:
        plan.notes.append(f"mm_vision_tower {name}: the source names no encoder; this one has the same sizes")
    return name


def _make(plan: Plan, changed: Plan, now: dict[str, Any], options: Options, folder: Path) -> dict[str, Any]:
    """Fill `folder`, put back what the target once had, read it back and check it; returns the report."""
    dtype = torch_dtype(options.dtype)
    given: dict[str, Any] = {}
    if options.to == "llava" and options.vision_tower:
        given = {"vision_tower": options.vision_tower}
    about = _layout_module("to", options.to).write(changed, folder, options.shard_bytes, dtype, **given) or {}
    back = kept.put_back(plan.source, now, folder, options.to, _not_of_then(options, options.to))
    names = kept.record(plan.source).get("names")
    if plan.layout == "hf":
        names = asdict(style_of(entry.name for entry in open_weights(plan.source)))
    home = {kept.group_of(name) for name in kept.originals(plan.source, options.to)}
    if "config" not in back or not home <= back:
        but = _not_of_then(options, plan.layout)
        kept.keep(plan, now, folder, options.to, but, {"names": names, **about})
    written = _layout_module("from", options.to).read(folder, **given)
    check_plan(written)
    if (folder / kept.FOLDER).is_dir():
        kept.add_print(folder, kept.print_of(written))
    check = _check(plan, changed, written, options, folder, dtype) if options.check else {"ran": False}
    return {
        "format": 1,
        "source": str(options.source),
        "from": plan.layout,
        "to": options.to,
        "out": str(options.out),
        "tensors": len(written.entries),
        "parameters": sum(entry.bytes // entry.dtype.itemsize for entry in written.entries),
        "bytes": sum(entry.bytes for entry in written.entries),
        "dtype": written.config.get("dtype"),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "put_back": sorted(back),
        "notes": list(dict.fromkeys(changed.notes)),
        "check": check,
    }


def _not_of_then(options: Options, layout: str) -> set[str]:
    """Groups of `layout`'s files (`kept.GROUPS`) that the flags make say something else."""
    groups = {"chat"} if options.conv_template else set()
    if options.dtype or options.drop_skip or options.skip_vision or (options.conv_template and layout != "hf"):
        groups |= {"config", "index"}
    return groups


def _check(
    plan: Plan, changed: Plan, written: Plan, options: Options, folder: Path, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Weights compared one by one; then, where memory allows, logits and greedy text."""
    done: dict[str, Any] = {"ran": True, "equal_weights": probe.compare_weights(changed, written, dtype, changed.notes)}
    why = probe.lacks_memory(written.entries)
    if why:
        return {**done, "logits": None, "why": why}
    stored = dtype or next(entry.dtype for entry in written.entries if entry.name == "model.embed_tokens.weight")
    given: dict[str, Any] = {"vision_tower": options.vision_tower} if options.vision_tower else {}
    given_new = given if options.to == "llava" else {}
    if options.skip_vision:
        probe.refuse_no_numbers(probe.ask(folder, options.to, stored, **given_new), changed.notes)
        return {**done, "logits": None, "why": "a model that skips is not the dense one; it was loaded and answers"}
    how = given | ({"model_base": options.base} if options.base else {}) if plan.layout == "llava" else {}
    if options.drop_skip and plan.config["mm_family"] != "llava":
        probe.refuse_no_numbers(probe.ask(folder, options.to, stored, **given_new), changed.notes)
        return {**done, "logits": None, "why": "the source skips and the result does not; it was loaded and answers"}
    old = probe.ask(plan.source, plan.layout, stored, dense=options.drop_skip, **how)
    new = probe.ask(folder, options.to, stored, asked=old, **given_new)
    probe.refuse_no_numbers(new, changed.notes)
    same_ids = old.ids == new.ids
    if not same_ids:
        changed.notes.append(
            f"prompts: the source's tokenizer makes {len(old.ids)} ids of the check's prompt and the result's "
            f"{len(new.ids)} (spaces beside the picture, most often); logits are compared on the source's ids"
        )
    same_pixels = old.pixels.shape == new.pixels.shape and torch.allclose(old.pixels, new.pixels, atol=1e-6)
    agreement = probe.compare(old, new)
    probe.refuse(agreement)
    return {
        **done,
        "logits": agreement.largest,
        "tolerance": agreement.tolerance,
        "same_text": agreement.same_text,
        "same_ids": same_ids,
        "same_pixels": same_pixels,
    }


def said(report: dict[str, Any]) -> list[str]:
    """The report as lines for a reader."""
    check = report["check"]
    lines = [f"note: {note}" for note in report["notes"]]
    if not check["ran"]:
        lines.append("check: not run (--no-check)")
    else:
        lines.append(f"check: {check['equal_weights']} weights are equal")
        if check["logits"] is None:
            lines.append(f"check: {check['why']}")
        else:
            text = "greedy texts are equal" if check["same_text"] else "greedy texts differ"
            lines.append(f"check: logits are at most {check['logits']:.3g} apart; {text}")
    size = f"{report['bytes'] / 1e9:.2f} GB" if report["bytes"] >= 1e8 else f"{report['bytes'] / 1e6:.2f} MB"
    lines.append(f"{report['out']}: {report['from']} -> {report['to']}, {report['tensors']} tensors, {size}")
    return lines
