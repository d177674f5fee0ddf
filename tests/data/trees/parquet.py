"""Parquet files as the `datasets` library writes them, for the sample trees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.trees.files import picture_bytes

TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def save_parquet(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    """types: of the columns whose type the values don't tell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path)
    return path


def pixels(name: str) -> dict[str, Any]:
    """A picture as a column holds it."""
    return {"bytes": picture_bytes(name), "path": name}
