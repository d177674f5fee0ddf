"""The records of a data set, checked once, laid out in Arrow and memory-mapped. Called by `train.build`,
`train.evaluation` and the `data` commands.

What `--data_path` names arrives (`open_records`); `Records` leave. A JSON file's index is made in a cache on first use
(`data.index_build`); every rank and worker shares the same pages, and opening them copies nothing.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llava_sv.data.index_build import build_index
from llava_sv.data.index_file import LAYOUT, IndexWriter, Rows, read_batches
from llava_sv.data.records import LlavaRecord
from llava_sv.errors import UserError

__all__ = ["INDEX_NAME", "IndexWriter", "Records", "index_location", "open_index", "open_records"]

INDEX_NAME = "index.arrow"
"""The index in a folder that `llava-sv data mix` writes."""

PIECE_COLUMNS = ("num_images", "num_turns", "num_chars")


class Records:
    """A sequence of `LlavaRecord`, memory-mapped. `path`: what was opened; `index_path`: its index.

    Columns (`num_images`, `num_turns`, `num_chars`, `modality`, `source_codes`, `lines`) are arrays [records], read
    without decoding any text and made anew each time: keep one only as long as it is needed. Pickled, it is its two
    paths: a worker opens the file itself.
    """

    def __init__(self, path: Path, index_path: Path) -> None:
        self.path, self.index_path = path, index_path
        self._batches = read_batches(index_path)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()
        self._rows: list[Rows | None] = [None] * len(self._batches)
        self._sources: list[str] | None = None

    def __reduce__(self) -> tuple[type[Records], tuple[Path, Path]]:
        return Records, (self.path, self.index_path)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> LlavaRecord:
        rows, row = self._at(index)
        return rows.record(row)

    def __iter__(self) -> Iterator[LlavaRecord]:
        return (self[index] for index in range(len(self)))

    def _at(self, index: int) -> tuple[Rows, int]:
        """The batch that holds a record, and the record's row there."""
        total = self._starts[-1]
        if not -total <= index < total:
            raise IndexError(f"record {index} of {total}")
        index = int(index) % total
        number = bisect_right(self._starts, index) - 1
        rows = self._rows[number]
        if rows is None:
            rows = self._rows[number] = Rows(self._batches[number])
        return rows, index - self._starts[number]

    def images_of(self, ids: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Image paths of the records with these ids, found without decoding the others."""
        wanted = pa.array(list(ids), pa.string())
        found: dict[str, tuple[str, ...]] = {}
        for start, batch in zip(self._starts, self._batches):
            here = pc.is_in(batch.column("id"), value_set=wanted).to_numpy(zero_copy_only=False)
            for row in here.nonzero()[0].tolist():
                record = self[start + row]
                found[record.id] = record.images
        return found

    @property
    def num_images(self) -> np.ndarray:
        """Images of each record, int32."""
        return self._column("num_images")

    @property
    def num_turns(self) -> np.ndarray:
        """Turns of each record, int32."""
        return self._column("num_turns")

    @property
    def num_chars(self) -> np.ndarray:
        """Characters of each record's turns together, int32."""
        return self._column("num_chars")

    @property
    def lines(self) -> np.ndarray:
        """Line of each record in the file it was read from, from 1, int64; 0: none."""
        return self._column("line")

    @property
    def modality(self) -> np.ndarray:
        """Whether each record has an image, bool."""
        return np.concatenate([batch.column("num_images").to_numpy() > 0 for batch in self._batches])

    @property
    def sources(self) -> list[str]:
        """The names of the sources that the records are from, sorted; "" stands for records that name none."""
        if self._sources is None:
            self._sources = sorted(
                {name for batch in self._batches for name in batch.column("source").unique().to_pylist()}
            )
        return list(self._sources)

    @property
    def source_codes(self) -> np.ndarray:
        """The source of each record, as its place in `sources`, int32."""
        names = pa.array(self.sources, pa.string())
        parts = [pc.index_in(batch.column("source"), value_set=names).to_numpy() for batch in self._batches]
        return np.concatenate(parts)

    def pieces(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(first record, its stretch of each of `PIECE_COLUMNS`), one stretch after the other: the columns of the
        largest data, never whole in memory."""
        for start, batch in zip(self._starts, self._batches):
            yield start, {name: batch.column(name).to_numpy() for name in PIECE_COLUMNS}

    def source_of(self, index: int) -> str:
        """The source of record `index`."""
        rows, row = self._at(index)
        return rows.source(row)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches])


def open_records(path: str | Path, cache_dir: str | Path | None = None) -> Records:
    """The records that `--data_path` names: a JSON or JSONL file (see `open_index`), an index (`.arrow`), or a folder
    with one, as `llava-sv data mix` writes it, or of shards.

    Raises `UserError` for something else, and for what is damaged.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / INDEX_NAME).is_file():
            return Records(path, path / INDEX_NAME)
        from llava_sv.data.shard_index import holds_shards, open_shards

        if holds_shards(path):
            return open_shards(path, cache_dir)
        raise UserError(
            f"{path}: holds no {INDEX_NAME} and no shards; name a folder that llava-sv data mix or shard made"
        )
    if path.suffix == ".arrow" and path.is_file():
        return Records(path, path)
    return open_index(path, cache_dir)


def open_index(path: str | Path, cache_dir: str | Path | None = None, workers: int | None = None) -> Records:
    """The records of a JSON or JSONL file; its index is made on the first call and found on later ones.

    cache_dir: default: `llava_sv` in the `datasets` library's cache (`HF_DATASETS_CACHE`). workers: processes that
    make it (see `build_index`). One process at a time makes it; a changed file gets a new one.

    Raises `UserError` at the first thing wrong with the file (see `read_values`, `check_record`).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such data file: {path}")
    index_path = index_location(path, cache_dir)
    build_index(path, index_path, workers)
    return Records(path, index_path)


def cache_folder() -> Path:
    """`llava_sv` in the `datasets` library's cache."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "llava_sv"


def index_location(path: Path, cache_dir: str | Path | None = None) -> Path:
    """Where the index of `path` belongs: named by the file's real path, then size, time of change, and `LAYOUT`."""
    folder = cache_folder() if cache_dir is None else Path(cache_dir)
    state = path.stat()
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    version = hashlib.sha256(f"{state.st_size}|{state.st_mtime_ns}|{LAYOUT}".encode()).hexdigest()[:12]
    return folder / f"{path.stem}-{where}{version}.arrow"
