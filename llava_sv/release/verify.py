"""`llava-sv verify`: whether a download of a release is whole, file by file and tensor by tensor.

A folder comes in; every problem goes out, a line each, with exit code 2 if there is one. Files are read in a stream;
torch is needed only to ask config.json which weights its model has. Also called by `hub`, before anything is sent.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_sv.errors import UserError
from llava_sv.files import check_can_write, read_json, write_json
from llava_sv.release import manifest
from llava_sv.release.tensor_bytes import BadHeader, Span, checksums, sha256_of_file, spans_of
from llava_sv.release.wanted import Shapes, compare, some, wanted_by

INDEX = "model.safetensors.index.json"
IGNORED = (".git", ".gitattributes", ".cache", ".DS_Store", ".huggingface")
"""What hubs and file managers leave beside a download."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LOADED = (".safetensors", *PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".py", ".pyc", ".so", ".pyd")
"""Ends of names that loading might read: weights and code that the release did not have are an error."""
CODE = (".py", ".pyc", ".so", ".pyd")
SETTINGS = (
    *("config.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json", ".jinja"),
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)
"""The same of what makes another model, tokenizer or prompt of it; `adapter_config.json` names another base."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. kind: missing, extra, size, damaged, header, key, index, config, manifest."""

    kind: str
    file: str
    line: str
    tensors: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """What a check found."""

    folder: Path
    files: int = 0
    bytes: int = 0
    tensors: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, file: str, what: str, tensors: list[str] | None = None) -> None:
        """A problem in `file`; its line begins with the file's name."""
        self.problems.append(Problem(kind, file, f"{file}: {what}", tensors or []))


def check(folder: Path) -> Findings:
    """Compare `folder` with its manifest.json, and its weights with config.json and the index of shards.

    Raises `UserError` for a folder without a manifest, or with one that cannot be read or must not be trusted.
    """
    listed = manifest.read(folder)
    files, tensors = listed["files"], listed["tensors"]
    found = Findings(folder, len(files), sum(entry["bytes"] for entry in files.values()), len(tensors))
    if manifest.digest_of(listed) != listed.get(manifest.SELF):
        found.add("manifest", manifest.NAME, "was changed after it was written (its own checksum differs)")
    held: dict[str, list[str]] = {}
    for name, entry in tensors.items():
        held.setdefault(entry["file"], []).append(name)
    there = {name for name in files if (folder / name).is_file()}
    headers: dict[str, list[Span]] = {}
    total = sum((folder / name).stat().st_size for name in there)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for name in sorted(files):
            if name not in there:
                held_said = f"; it held {_count(held[name])}: {some(sorted(held[name]))}" if name in held else ""
                found.add("missing", name, f"is missing{held_said}", sorted(held.get(name, [])))
            elif name.endswith(manifest.WEIGHTS):
                headers[name] = _check_weights(found, name, files[name], tensors, held.get(name, []), bar)
            else:
                _check_file(found, name, files[name], bar)
    _check_extra(found, files)
    shapes = {span.name: (name, span.shape) for name in sorted(headers) for span in headers[name]}
    unread = {p.file for p in found.problems if p.file in held and p.kind in ("missing", "header") and p.tensors}
    _check_index(found, {name: file for name, (file, _) in shapes.items()}, unread)
    _check_config(found, shapes, {name for file in unread for name in held[file]})
    return found


def _check_file(found: Findings, name: str, entry: dict[str, Any], bar: Any) -> None:
    path = found.folder / name
    size = path.stat().st_size
    if size != entry["bytes"]:
        bar.update(size)
        found.add("size", name, f"has {size:,} bytes, {entry['bytes']:,} were released")
    elif sha256_of_file(path, bar.update) != entry["sha256"]:
        found.add("damaged", name, "damaged (its SHA-256 differs from the manifest's)")


def _check_weights(
    found: Findings, name: str, entry: dict[str, Any], tensors: dict[str, Any], held: list[str], bar: Any
) -> list[Span]:
    """Check a file of tensors; returns where they lie, nothing if its header cannot be read."""
    path = found.folder / name
    size = path.stat().st_size
    whole = size == entry["bytes"]
    same = sha256_of_file(path, bar.update) == entry["sha256"]
    cut = "" if whole else f"has {size:,} bytes, {entry['bytes']:,} were released"
    try:
        spans = spans_of(path)
    except BadHeader as error:
        what = "; ".join(filter(None, [cut, f"its header is damaged: {error}"]))
        found.add("header", name, f"{what}; it held {_count(held)}", sorted(held))
        return []
    renamed = _check_names(found, name, spans, tensors, held)
    if same:
        return spans
    read = checksums(path, spans)[1]
    known = [span for span in spans if tensors.get(span.name, {}).get("file") == name]
    short = [span.name for span in spans if span.name not in read]
    bad = [s.name for s in known if s.name in read and read[s.name] != tensors[s.name]["sha256"]]
    if cut:
        more = f"; {_count(short)} cut off: {some(short)}" if short else ""
        found.add("size", name, cut + more, short)
    if bad:
        found.add("damaged", name, f"damaged in {some(bad)} (SHA-256 differs from the manifest's)", bad)
    if not bad and not cut and not renamed:
        found.add(
            "header", name, "its header differs from the one released; the values of all tensors it names are those"
        )
    return spans


def _check_names(found: Findings, name: str, spans: list[Span], tensors: dict[str, Any], held: list[str]) -> bool:
    """Compare names, shapes and types in a file's header with the manifest's; whether they differ."""
    names = {span.name for span in spans}
    has = sorted(n for n in names if tensors.get(n, {}).get("file") != name)
    lacks = sorted(set(held) - names)
    if has or lacks:
        found.add("key", name, f"{_has_lacks(has, lacks)} (by {manifest.NAME})", has + lacks)
    other = [
        span.name
        for span in spans
        if span.name in held
        and (list(span.shape), span.dtype) != (tensors[span.name]["shape"], tensors[span.name]["dtype"])
    ]
    if other:
        found.add("key", name, f"has in another shape or type than the manifest says: {some(other)}", other)
    return bool(has or lacks or other)


def _check_extra(found: Findings, files: dict[str, Any]) -> None:
    """Files that the release did not have: an error where loading might read them, else a note."""
    for path in sorted(found.folder.rglob("*")):
        name = path.relative_to(found.folder)
        folder = path.is_dir() and not path.is_symlink()  # what a link leads to is not looked through
        if name.parts[0] in IGNORED or folder or name.as_posix() in (*files, manifest.NAME):
            continue
        kind = _read_as(path.name.lower())
        if kind and not path.is_dir():
            found.add("extra", name.as_posix(), f"is no part of the release, and it is {kind}; remove it")
        else:
            found.notes.append(f"{name.as_posix()}: is no part of the release")


def _read_as(name: str) -> str | None:
    """What loading might take a file of this name for; None where it reads none such."""
    if name.endswith(LOADED):
        return "code" if name.endswith(CODE) else "a file of weights"
    return "read with the settings" if name.endswith(SETTINGS) else None


def _check_index(found: Findings, held: dict[str, str], unread: set[str]) -> None:
    """held: name of a tensor -> the file that really has it; unread: files that are missing or whose header is
    damaged, which has been said."""
    path = found.folder / INDEX
    shards = set(held.values())
    if not path.is_file():
        if len(shards) > 1 and INDEX not in {p.file for p in found.problems}:
            found.add("index", INDEX, f"is missing, and there are {len(shards)} files of weights")
        return
    try:
        values = read_json(path, "the download again")
    except UserError as error:
        found.problems.append(Problem("index", INDEX, _about(found.folder, error)))
        return
    mapping = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        found.add("index", INDEX, "has no weight_map (name of a tensor -> file)")
        return
    lists = sorted(name for name, file in mapping.items() if name not in held and file in shards)
    lacks = sorted(name for name in held if name not in mapping)
    if lists or lacks:
        said = [f"lists {some(lists)}, which no file has" if lists else "", f"lacks {some(lacks)}" if lacks else ""]
        found.add("index", INDEX, ", ".join(filter(None, said)), lists + lacks)
    wrong = sorted(name for name, file in mapping.items() if name in held and held[name] != file)
    if wrong:
        found.add("index", INDEX, f"says another file than the one it is in for {some(wrong)}", wrong)
    absent = sorted(set(mapping.values()) - shards - unread)
    if absent:
        found.add("index", INDEX, f"names files of weights that are not there: {some(absent)}")


def _check_config(found: Findings, held: dict[str, tuple[str, tuple[int, ...]]], missing: set[str]) -> None:
    """What config.json's model needs against what is there; missing: tensors of files that
    could not be read, which has been said."""
    if not (found.folder / "config.json").is_file():
        if "config.json" not in {p.file for p in found.problems}:
            found.add("config", "config.json", "is missing")
        return
    from llava_sv.model.loading import read_config, read_config_json
    from llava_sv.release.releasable import encoder_is_inside

    try:
        if not encoder_is_inside(read_config_json(str(found.folder))[1]):
            raise UserError("it holds no encoder")  # building it would look for one elsewhere, on a hub even
        wanted = wanted_by(read_config(str(found.folder)))
    except Exception as error:  # whatever a damaged config makes the model's classes raise
        found.add("config", "config.json", f"no model can be built of it ({_about(found.folder, error)})")
        return
    shapes: Shapes = {name: shape for name, (_, shape) in held.items()}
    different = compare(wanted, shapes)
    lacks = [name for name in different.lacks if name not in missing]
    if lacks or different.has:
        where = held[different.has[0]][0] if different.has else "weights"
        found.add("key", where, f"{_has_lacks(different.has, lacks)} (by config.json)", different.has + lacks)
    if different.misshapen:
        found.add(
            "key",
            held[different.misshapen[0]][0],
            f"has in another shape than config.json says: {some(different.misshapen)}",
        )


def _has_lacks(has: list[str], lacks: list[str]) -> str:
    parts = [f"has {some(has)}" if has else "", f"lacks {some(lacks)}" if lacks else ""]
    return ", ".join(filter(None, parts))


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _about(folder: Path, error: Exception) -> str:
    """An error's words on one line, names of files without the folder."""
    return " ".join(str(error).split()).replace(f"{folder}/", "")[:300]


def build_parser() -> argparse.ArgumentParser:
    """All flags of `llava-sv verify`."""
    parser = argparse.ArgumentParser(
        prog="llava-sv verify",
        description="Check a folder that llava-sv release made, after a download say: every file and tensor against "
        "manifest.json, the weights against config.json. Every problem is listed; exit code 2 if there is one.",
        epilog="example: llava-sv verify checkpoints/llava-sv-7b",
    )
    parser.add_argument("folder", metavar="DIR", help="the folder")
    parser.add_argument("--json", metavar="FILE", help="write what was found there too")
    return parser


def report(found: Findings) -> dict[str, Any]:
    """What `--json` holds."""
    values = asdict(found)
    return {**values, "folder": str(found.folder), "ok": not found.problems}


def main(argv: list[str]) -> int:
    """`llava-sv verify DIR`."""
    args = build_parser().parse_args(argv)
    if args.json:
        check_can_write("--json", Path(args.json))
    found = check(Path(args.folder))
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(f"bad: {problem.line}")
    if args.json:
        write_json(args.json, report(found))
    if found.problems:
        count = f"{len(found.problems)} problem{'s' * (len(found.problems) != 1)}"
        extra = all(problem.kind == "extra" for problem in found.problems)
        mend = "remove" if extra else "download again"
        print(f"{args.folder}: {count}; {mend} what is named above, then run llava-sv verify once more")
        return 2
    print(f"{args.folder}: whole ({found.files} files, {found.bytes:,} bytes, {found.tensors} tensors)")
    return 0
