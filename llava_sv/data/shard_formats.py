"""One shard written: a WebDataset tar or a parquet file of records with their pictures' own bytes. Called by
`data.shard`.

The same records give the same bytes, whoever packs them and when.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from llava_sv.data.image_refs import SEPARATOR
from llava_sv.data.records import LlavaRecord, as_json

KEY_DIGITS = 9

MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)
"""First bytes of a picture's file -> the ending its member gets."""

GROUP_BYTES = 2 << 20
GROUP_ROWS = 256
"""A parquet row group is closed at so many bytes of pictures, or rows: reading one row reads its whole group."""


@dataclass(frozen=True)
class Packed:
    """A record on its way into a shard. number: of the record in the data. images: the pictures' files."""

    number: int
    record: LlavaRecord
    source: str
    images: tuple[bytes, ...]


def ending(data: bytes, ref: str) -> str:
    """What kind of file a picture is: by its first bytes, else by its name."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for magic, name in MAGIC:
        if data.startswith(magic):
            return name
    name = ref.partition(SEPARATOR)[0] if SEPARATOR not in ref else ref.partition(SEPARATOR)[2]
    return PurePosixPath(name).suffix.lower().lstrip(".") or "img"


def image_names(packed: Packed) -> list[str]:
    """KEY.jpg, or KEY.0.jpg, KEY.1.jpg, ..."""
    key = f"{packed.number:0{KEY_DIGITS}d}"
    endings = [ending(data, ref) for data, ref in zip(packed.images, packed.record.images)]
    return [f"{key}.{end}" if len(endings) == 1 else f"{key}.{place}.{end}" for place, end in enumerate(endings)]


def _json(packed: Packed, images: list[str]) -> bytes:
    """The record, its pictures called `images`."""
    value = as_json(replace(packed.record, images=tuple(images)), packed.source)
    return json.dumps(value, ensure_ascii=False).encode()


def write_tar(path: Path, samples: Iterable[Packed]) -> int:
    """KEY.json and the pictures of each sample, in order; returns how many samples."""
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for packed in samples:
            names = image_names(packed)
            _add(tar, f"{packed.number:0{KEY_DIGITS}d}.json", _json(packed, names))
            for name, data in zip(names, packed.images):
                _add(tar, name, data)
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has written
            count += 1
    return count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and group are 0
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, samples: Iterable[Packed]) -> int:
    """Rows of id, source, images (a list of {bytes, path}), speakers, values; returns how many samples."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("images", pa.list_(picture)),
            ("speakers", pa.list_(pa.string())),
            ("values", pa.list_(pa.string())),
        ]
    )
    count, size, rows = 0, 0, []
    # pictures are compressed already, and statistics of them would hold whole pictures
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=["source"], write_statistics=["id"], store_schema=True
    ) as writer:
        for packed in samples:
            pictures = [{"bytes": data, "path": name} for data, name in zip(packed.images, image_names(packed))]
            turns = packed.record.turns
            rows.append(
                {
                    "id": packed.record.id,
                    "source": packed.source,
                    "images": pictures,
                    "speakers": [turn["from"] for turn in turns],
                    "values": [turn["value"] for turn in turns],
                }
            )
            size += sum(map(len, packed.images))
            count += 1
            if size >= GROUP_BYTES or len(rows) >= GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                size, rows = 0, []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return count


FORMATS: dict[str, Callable[[Path, Iterable[Packed]], int]] = {"tar": write_tar, "parquet": write_parquet}
"""Format, which is also the file's ending -> what writes a shard in it."""
