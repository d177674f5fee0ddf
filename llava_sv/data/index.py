"""The index of a data file: its records, checked once and laid out in Arrow, memory-mapped from a cache.

A LLaVA JSON or JSONL file arrives; `Records` leave. Called by `train.build` and the `data` commands. The file
is streamed (arrays too), so memory stays small whatever its size; every rank and worker shares the same pages.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from tqdm import tqdm

from llava_sv.data.json_stream import read_values
from llava_sv.data.records import LlavaRecord, check_record
from llava_sv.errors import UserError
from llava_sv.files import replacing

LAYOUT = 1
"""Version of the columns below; a change makes new indexes."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("speakers", pa.list_(pa.string())),
        ("values", pa.list_(pa.string())),
        ("num_images", pa.int32()),
        ("num_turns", pa.int32()),
        ("num_chars", pa.int32()),
    ]
)
BATCH = 1000


class Records:
    """A sequence of `LlavaRecord`, memory-mapped. `path`: the data file; `index_path`: its index.

    `num_images`, `num_turns`, `num_chars` (of all turns together): int arrays [records], read without decoding text.
    """

    def __init__(self, path: Path, index_path: Path) -> None:
        import datasets

        self.path, self.index_path = path, index_path
        self._data = datasets.Dataset.from_file(str(index_path))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> LlavaRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        row = self._data[int(index) % len(self)]
        turns = tuple({"from": who, "value": said} for who, said in zip(row["speakers"], row["values"]))
        return LlavaRecord(row["id"], tuple(row["images"]), turns)

    def __iter__(self) -> Iterator[LlavaRecord]:
        return (self[index] for index in range(len(self)))

    def images_of(self, ids: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Image paths of the records with these ids, found without decoding the others."""
        column = self._data.data.column("id")
        found = pc.is_in(column, value_set=pa.array(list(ids), column.type)).to_numpy()
        return {record.id: record.images for record in (self[int(index)] for index in found.nonzero()[0])}

    @property
    def num_images(self) -> np.ndarray:
        """Images of each record."""
        return self._column("num_images")

    @property
    def num_turns(self) -> np.ndarray:
        """Turns of each record."""
        return self._column("num_turns")

    @property
    def num_chars(self) -> np.ndarray:
        """Characters of each record's turns."""
        return self._column("num_chars")

    def _column(self, name: str) -> np.ndarray:
        return self._data.data.column(name).to_numpy()


def open_index(path: str | Path, cache_dir: str | Path | None = None) -> Records:
    """The records of `path`; its index is made on the first call and found on later ones.

    cache_dir: default: `llava_sv` in the `datasets` library's cache (`HF_DATASETS_CACHE`). The index is made under a
    temporary name and by one process at a time; a changed file gets a new one.

    Raises `UserError` at the first thing wrong with the file (see `read_values`, `check_record`).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such data file: {path}")
    index_path = index_location(path, cache_dir)
    if not index_path.is_file():
        index_path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{index_path}.lock"):
            if not index_path.is_file():
                _build(path, index_path)
    return Records(path, index_path)


def index_location(path: Path, cache_dir: str | Path | None = None) -> Path:
    """Where the index of `path` belongs: named by the file's real path, size, time of change, and `LAYOUT`."""
    if cache_dir is None:
        import datasets

        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "llava_sv"
    state = path.stat()
    key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{LAYOUT}"
    return Path(cache_dir) / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"


def checked_records(values: Iterable[tuple[int, Any]], path: Path) -> Iterator[LlavaRecord]:
    """The records of (line, value) pairs. Raises `UserError` at the first that is not one."""
    for line, value in values:
        yield check_record(value, f"{path} line {line}")


def _build(path: Path, index_path: Path) -> None:
    bar = tqdm(
        total=path.stat().st_size, desc=f"indexing {path.name}", unit="B", unit_scale=True, disable=_is_quiet(path)
    )
    with bar, replacing(index_path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_stream(sink, SCHEMA) as writer:
            records = checked_records(read_values(path, progress=bar.update), path)
            total = 0
            while batch := list(itertools.islice(records, BATCH)):
                writer.write_batch(_columns(batch))
                total += len(batch)
        if not total:
            raise UserError(f"{path}: holds no records")


def _is_quiet(path: Path) -> bool:
    """A small file needs no bar, and one rank's is enough."""
    return path.stat().st_size < 1 << 24 or os.environ.get("LOCAL_RANK", "0") != "0"


def _columns(records: list[LlavaRecord]) -> pa.RecordBatch:
    columns = [
        [record.id for record in records],
        [list(record.images) for record in records],
        [[turn["from"] for turn in record.turns] for record in records],
        [[turn["value"] for turn in record.turns] for record in records],
        [len(record.images) for record in records],
        [len(record.turns) for record in records],
        [sum(len(turn["value"]) for turn in record.turns) for record in records],
    ]
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)], schema=SCHEMA)
