"""The small files that a checkpoint had before it was converted, kept beside it and put back on the way home.

`conversion/LAYOUT/` in a converted folder holds them; `conversion/conversion.json` says what the folder was like when
it was made (`print_of`). On the way back a group of files is put back verbatim where what it says has not changed since
then, and only there: a checkpoint that was trained or edited meanwhile gets new ones. Called by converting.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from llava_sv.errors import UserError
from llava_sv.files import read_json, sha256_of, write_json
from llava_sv.release.plan import LAYOUTS, Plan

FOLDER, RECORD = "conversion", "conversion.json"
INDEX = "model.safetensors.index.json"
GROUPS: dict[str, tuple[str, ...]] = {
    "config": ("config.json",),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
    ),
    "chat": ("chat_template.jinja", "chat_template.json"),
    "processor": ("preprocessor_config.json", "processor_config.json"),
    "generation": ("generation_config.json",),
    "index": (INDEX,),
}
"""Files that are put back together."""

NEEDS: dict[str, tuple[str, ...]] = {
    "config": ("config",),
    "tokenizer": ("tokenizer",),
    "chat": ("conv_template", "tokenizer"),
    "processor": ("config", "processor"),
    "generation": ("generation",),
}
"""Group -> what must not have changed for it to be put back; the index is compared with the new one."""

GENERATED = ("conv_template", "transformers_version")
"""Fields of a config that are compared apart, or not at all."""


def record(folder: Path) -> dict[str, Any]:
    """What a converted folder says of itself; empty for one that is not, or whose record is broken."""
    try:
        values = read_json(folder / FOLDER / RECORD, "llava-sv convert")
    except (UserError, OSError):
        return {}
    return values if isinstance(values, dict) and values.get("format") == 1 else {}


def print_of(plan: Plan) -> dict[str, Any]:
    """What is to be compared of a checkpoint as its reader sees it."""
    processor = plan.image_processor.to_dict() if plan.image_processor is not None else None
    generation = plan.source / "generation_config.json"
    values = read_json(generation, "the download or the training again") if generation.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{generation}: holds a {type(values).__name__}, not settings; get the file again")
    made = {
        "config": {name: value for name, value in plan.config.items() if name not in GENERATED},
        "conv_template": plan.config.get("conv_template"),
        "tokenizer": tokenizer_print(plan.tokenizer),
        "processor": processor,
        "generation": {name: value for name, value in values.items() if name != "transformers_version"},
        "transformers": transformers.__version__,
    }
    return json.loads(json.dumps(made, default=str))


def tokenizer_print(tokenizer: Any) -> str:
    """A checksum of all that a tokenizer does."""
    about = [core_of(tokenizer), str(tokenizer.special_tokens_map), tokenizer.padding_side, tokenizer.model_max_length]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def core_of(tokenizer: Any) -> str:
    """What cuts text into ids, as text; its special tokens' roles are not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def unchanged(then: Any, now: Any, exact: bool = False) -> bool:
    """Whether two prints agree; but for `exact`, fields that only one of two releases of transformers knows are not
    compared."""
    if not exact and isinstance(then, dict) and isinstance(now, dict):
        return all(unchanged(then[name], now[name]) for name in then.keys() & now.keys())
    return then == now


def _same_groups(source: Path, now: dict[str, Any], layout: str) -> set[str]:
    """Groups of `layout`'s files that still say what `source` (`now` is its print) said when it was made."""
    then = record(source).get("print") or {}
    one_release = then.get("transformers") == now["transformers"]
    same = {
        need
        for need in now
        if need in then and unchanged(then[need], now[need], exact=one_release or need == "generation")
    }
    groups = {group for group, needs in NEEDS.items() if same.issuperset(needs)} | {"index"}
    # transformers' config.json names no conversation template, the others' do
    return groups if layout == "hf" or "conv_template" in same else groups - {"config", "processor"}


def originals(folder: Path, layout: str) -> dict[str, Path]:
    """Kept files of `layout`: name -> where its bytes are (its copy, or the folder's own equal file)."""
    found = {}
    for name, sha in (record(folder).get("kept", {}).get(layout) or {}).items():
        own = folder / FOLDER / layout / name
        place = own if own.is_file() else folder / name
        if name in _names() and place.is_file() and sha256_of(place) == sha:
            found[name] = place
    return found


def _absent(folder: Path, layout: str) -> list[str]:
    """Groups of which `layout` had no file."""
    return [group for group in record(folder).get("absent", {}).get(layout) or [] if group in NEEDS]


def _names() -> list[str]:
    return [name for names in GROUPS.values() for name in names]


@contextmanager
def tokenizer_before(folder: Path) -> Iterator[Path | None]:
    """A folder with the tokenizer files that were kept of the layout before the last conversion, if they are whole."""
    layout = str(record(folder).get("from"))
    files = {name: path for name, path in originals(folder, layout).items() if name in GROUPS["tokenizer"]}
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        yield None
        return
    with tempfile.TemporaryDirectory() as work:
        for name, path in files.items():
            shutil.copyfile(path, Path(work) / name)
        yield Path(work)


def config_before(folder: Path) -> dict[str, Any]:
    """config.json from before the last conversion, where it was kept; else nothing."""
    path = originals(folder, str(record(folder).get("from"))).get("config.json")
    values = read_json(path, "llava-sv convert") if path else {}
    return values if isinstance(values, dict) else {}


def put_back(source: Path, now: dict[str, Any], folder: Path, layout: str, but: set[str]) -> set[str]:
    """Put kept files of `layout` into the new `folder`, group by group where `now` (the print of `source`) says that
    nothing has changed; groups in `but` are left out. Returns the groups whose files are those of then."""
    files, back = originals(source, layout), set()
    same = _same_groups(source, now, layout) - but
    absent = _absent(source, layout)
    for group, names in GROUPS.items():
        chosen = {name: files[name] for name in names if name in files}
        if not (chosen or group in absent) or group not in same:
            continue
        if group == "index" and not _fits(chosen[INDEX], folder / INDEX):
            continue
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for name, path in chosen.items():
            shutil.copyfile(path, folder / name)
        back.add(group)
    return back


def _fits(index: Path, new: Path) -> bool:
    """Whether the kept index of shards lists what the new one lists."""
    if not new.is_file():
        return False
    old, made = json.loads(index.read_text(encoding="utf-8")), json.loads(new.read_text(encoding="utf-8"))
    size = (old.get("metadata") or {}).get("total_size")
    return old.get("weight_map") == made.get("weight_map") and size in (None, made["metadata"]["total_size"])


def keep(plan: Plan, now: dict[str, Any], folder: Path, layout: str, but: set[str], about: dict[str, Any]) -> None:
    """Keep the small files of `plan.source` in the new `folder`, and those of other layouts that it had kept and that
    still hold. but: groups that the new folder does not say the same of; about: what else to record."""
    sources: dict[str, dict[str, Path]] = {}
    absent: dict[str, list[str]] = {}
    if plan.layout != layout:
        own = {name: plan.source / name for name in _names() if (plan.source / name).is_file()}
        sources[plan.layout] = own
        absent[plan.layout] = [group for group in NEEDS if group not in {group_of(name) for name in own} | but]
    for other in LAYOUTS:
        if other not in (plan.layout, layout):
            same = _same_groups(plan.source, now, other)
            absent[other] = [group for group in _absent(plan.source, other) if group in same - but]
            held = originals(plan.source, other)
            sources[other] = {name: path for name, path in held.items() if group_of(name) in same}
    kept: dict[str, dict[str, str]] = {}
    for name_of, files in sources.items():
        for name, path in files.items():
            if group_of(name) in but:
                continue
            sha = sha256_of(path)
            kept.setdefault(name_of, {})[name] = sha
            if not (folder / name).is_file() or sha256_of(folder / name) != sha:
                (folder / FOLDER / name_of).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / FOLDER / name_of / name)
    if not kept and plan.layout == layout:
        return
    (folder / FOLDER).mkdir(exist_ok=True)
    before = record(plan.source).get("from") if plan.layout == layout else plan.layout
    write_json(folder / FOLDER / RECORD, {"format": 1, "from": before, "kept": kept, "absent": absent, **about})


def group_of(name: str) -> str:
    return next(group for group, names in GROUPS.items() if name in names)


def add_print(folder: Path, values: dict[str, Any]) -> None:
    """Record the print of the finished `folder`."""
    write_json(folder / FOLDER / RECORD, {**record(folder), "print": values})
