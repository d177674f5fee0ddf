"""Records in an Arrow file, mapped into memory: opening copies nothing, and every process shares the same pages. A file
that `data.index_file` wrote arrives, a sequence of records leaves. Called by `data.index` and `data.shard_index`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llava_sv.data.index_file import Rows, read_batches
from llava_sv.data.records import LlavaRecord

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
