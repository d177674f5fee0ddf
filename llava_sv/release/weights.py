"""A checkpoint's tensors as a list that is read one by one, and files of tensors written shard by shard.

`open_weights` reads names, shapes and types only; `write_weights` holds one shard in memory at a time. Safetensors go
before pickled files, and those are read by torch's restricted unpickler: no code of a checkpoint runs.
Called by converting and by releasing.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llava_sv.errors import UserError, not_written
from llava_sv.files import read_json, replacing, write_json
from llava_sv.model.checkpoint_io import UNREADABLE

SHARD_BYTES = 5 * 10**9
"""Most bytes of a shard, as transformers has it; a larger tensor is alone."""

STEMS = ("model.safetensors", "pytorch_model.bin")
"""Weight files of a whole checkpoint, the better one first; in shards, `<stem>.index.json` lists them."""


@dataclass(frozen=True)
class Entry:
    """A tensor that has not been read: its name, shape and type, the file it is in, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    """Name of the file that holds it; entries of one file may be written to one file again."""
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Of its values."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def renamed(self, name: str) -> Entry:
        """The same tensor under another name."""
        return replace(self, name=name)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """`bfloat16` -> `torch.bfloat16`; None stays None, which is: as they are."""
    return getattr(torch, name) if name else None


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a whole checkpoint, in order of their names.

    Raises `UserError` for a folder without any, for a shard that the index names and that is not there, and for a
    broken index.
    """
    folder = Path(folder)
    for stem in STEMS:
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _listed(folder, index)
    raise UserError(f"checkpoint {folder}: has no weights ({' or '.join(STEMS)}, or an index of shards)")


def _listed(folder: Path, index: Path) -> list[Path]:
    values = read_json(index, "the download again")
    mapping = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise UserError(f"{index}: has no weight_map (name of a tensor -> file); download it again")
    names = sorted(set(mapping.values()))
    outside = [name for name in names if os.path.basename(name) != name]
    if outside:
        raise UserError(f"{index}: names {outside[0]!r}, which is not a file beside it")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"checkpoint {folder}: lacks {', '.join(absent)}, which {index.name} names; download it again")
    return [folder / name for name in names]


def open_weights(folder: str | Path) -> list[Entry]:
    """All tensors of a whole checkpoint, file by file, unread. Raises `UserError` for what cannot be read."""
    entries = [entry for path in weight_files(folder) for entry in entries_of(path)]
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise UserError(f"checkpoint {folder}: {entry.name} is in {seen[entry.name]} and in {entry.file}")
        seen[entry.name] = entry.file
    return entries


def entries_of(path: Path) -> list[Entry]:
    """The tensors of one file, unread, in the file's order."""
    try:
        return list(_of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path))
    except UNREADABLE as error:
        raise UserError(f"weights {path}: cannot be read ({str(error).splitlines()[0]})") from error


def _of_safetensors(path: Path) -> Iterator[Entry]:
    from safetensors.torch import _TYPES  # names of the format's types; the library has no public table

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            dtype: Any = _TYPES[part.get_dtype()]
            yield Entry(name, tuple(part.get_shape()), dtype, path.name, _reader(path, name))


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return load


def _of_pickle(path: Path) -> Iterator[Entry]:
    values = torch.load(path, map_location="meta", weights_only=True)
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, not tensors by name")
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
        yield Entry(name, tuple(value.shape), value.dtype, path.name, _unpickler(path, name))


def _unpickler(path: Path, name: str) -> Callable[[], Tensor]:
    return lambda: _pickled(str(path))[name]


@lru_cache(maxsize=1)
def _pickled(path: str) -> dict[str, Tensor]:
    """A pickled file's tensors; one file is held at a time, mapped from the disk where its form allows."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def in_shards(entries: list[Entry], shard_bytes: int = SHARD_BYTES) -> list[list[Entry]]:
    """Entries in order, cut where the next one would go over `shard_bytes`."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def write_weights(
    folder: Path, entries: list[Entry], shard_bytes: int | None = SHARD_BYTES, dtype: torch.dtype | None = None
) -> list[str]:
    """Write safetensors (and the index, where there are several) as transformers names them; returns the files' names.

    shard_bytes None keeps the entries of one file together, as the source has them. dtype: type to store floating
    values in. One shard is in memory at a time. The same entries give the same bytes.
    """
    shards = _as_in_source(entries) if shard_bytes is None else in_shards(entries, shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    total = parameters = 0
    weight_map: dict[str, str] = {}
    bar = tqdm(total=sum(entry.bytes for entry in entries), unit="B", unit_scale=True, desc="weights", disable=None)
    for name, shard in zip(names, shards):
        tensors: dict[str, Tensor] = {}
        for entry in shard:
            value = entry.load().detach()
            if dtype is not None and value.is_floating_point():
                value = _as_type(value, dtype, entry)
            if tuple(value.shape) != entry.shape:
                raise UserError(f"weights {entry.file}: {entry.name} has shape {list(value.shape)}, not as announced")
            tensors[entry.name] = value.contiguous()
            weight_map[entry.name] = name
            total += value.numel() * value.element_size()
            parameters += value.numel()
            bar.update(entry.bytes)
        _save(tensors, folder / name)
    bar.close()
    if len(names) > 1:
        metadata = {"total_parameters": parameters, "total_size": total}
        _write_index(folder / "model.safetensors.index.json", metadata, weight_map)
    return names


def _as_type(value: Tensor, dtype: torch.dtype, entry: Entry) -> Tensor:
    """`UserError` for a number that the type has no room for."""
    made = value.to(dtype)
    if made.dtype != value.dtype and bool((value.isfinite() & ~made.isfinite()).any()):
        most = value[value.isfinite()].abs().max()
        raise UserError(
            f"weights {entry.file}: {entry.name} has values up to {most:.3g}, more than "
            f"{str(dtype).removeprefix('torch.')} holds; store another type"
        )
    return made


def _as_in_source(entries: list[Entry]) -> list[list[Entry]]:
    by_file: dict[str, list[Entry]] = {}
    for entry in entries:
        by_file.setdefault(entry.file, []).append(entry)
    return list(by_file.values())


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    places: dict[int, str] = {}
    for name, value in tensors.items():  # the format takes no tensors that share memory
        if value.untyped_storage().data_ptr() in places or value.untyped_storage().nbytes() != value.nbytes:
            tensors[name] = value.clone()
        else:
            places[value.untyped_storage().data_ptr()] = name
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            system = OSError(int(code[1]), str(error))
            raise not_written(f"weights {path}:", system, "make room there, or write elsewhere") from error


def _write_index(path: Path, metadata: dict[str, Any], weight_map: dict[str, str]) -> None:
    write_json(path, json.loads(json.dumps({"metadata": metadata, "weight_map": weight_map}, sort_keys=True)))
