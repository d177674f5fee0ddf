"""Exact lengths of samples, counted once and kept beside the index: what packing needs. Called by `data.packing`.

Records, a tokenizer and a template arrive; tokens of each record's text leave, and sizes of its pictures where an
image's tokens depend on them. One process of a node counts, in parallel; the others read what it wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.conversation import Template
from llava_sv.data.image_store import ImageStore
from llava_sv.data.index import Records
from llava_sv.data.preprocess import preprocess
from llava_sv.data.split import SomeRecords
from llava_sv.files import replacing
from llava_sv.mm_utils import ImageError

CHUNK = 500
"""Records that one worker counts at a time."""

MAX_WORKERS = 16


def exact_lengths(
    records: Records | SomeRecords,
    tokenizer: Any,
    template: Template,
    visual_tokens: Callable[[tuple[int, int] | None], int],
    image_folder: str | Path | None,
) -> np.ndarray:
    """Tokens of each record in the spliced sequence, int [records].

    visual_tokens: of a picture of a size (width, height), and of None the most; pictures are only looked at where it
    depends on the size. One that cannot be read counts as the largest.
    """
    if isinstance(records, SomeRecords):
        whole = exact_lengths(records.records, tokenizer, template, visual_tokens, image_folder)
        return whole[records.indices]
    lengths = text_lengths(records, tokenizer, template)
    images = records.num_images
    if not images.any():
        return lengths
    most = visual_tokens(None)
    if visual_tokens((1, 1)) == most or image_folder is None:
        return lengths + images * most
    count = lru_cache(maxsize=None)(visual_tokens)
    sizes = image_sizes(records, image_folder)
    each = np.array([count((int(width), int(height)) if width else None) for width, height in sizes])
    owner = np.repeat(np.arange(len(records)), images)
    return lengths + np.bincount(owner, weights=each, minlength=len(records)).astype(int)


def text_lengths(records: Records, tokenizer: Any, template: Template) -> np.ndarray:
    """Tokens of each record's text, images not counted, int [records]."""
    kind = repr((tokenizer.backend_tokenizer.to_str(), tokenizer("a")["input_ids"], template))

    def count(index: int) -> int:
        ids = preprocess(records[index], tokenizer, template)["input_ids"]
        return int((ids != IMAGE_TOKEN_INDEX).sum())

    return _kept(records, "text", kind, count, "counting tokens")


def image_sizes(records: Records, folder: str | Path) -> np.ndarray:
    """(width, height) in pixels of every picture of every record in turn, upright; (0, 0) where it cannot be read.

    Only the head of a file is read.
    """
    store = ImageStore(folder)
    sizes = _kept(
        records,
        "sizes",
        str(Path(folder).resolve()),
        lambda index: [_size(store, name) for name in records[index].images],
        "reading image sizes",
    )
    return np.asarray(sizes, dtype=int).reshape(-1, 2)


def _size(store: ImageStore, image: str) -> tuple[int, int]:
    try:
        return store.size(image)
    except ImageError:  # training says what is wrong with it
        return 0, 0


class _Chunks(Dataset):
    """Item i: what `count` finds for each record of the i-th `CHUNK`."""

    def __init__(self, total: int, count: Callable[[int], Any]) -> None:
        self.total, self.count = total, count

    def __len__(self) -> int:
        return -(-self.total // CHUNK)

    def __getitem__(self, index: int) -> str:
        start = index * CHUNK
        found = [self.count(record) for record in range(start, min(start + CHUNK, self.total))]
        return json.dumps(found)  # small, and no memory is shared for it


def _kept(records: Records, what: str, kind: str, count: Callable[[int], Any], doing: str) -> np.ndarray:
    """`count` of every record, from the file that an earlier call left, or counted and written there."""
    key = hashlib.sha256(kind.encode()).hexdigest()[:16]
    path = records.index_path.with_suffix(f".{what}-{key}.npy")
    if not path.is_file():
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                found = _counted(len(records), count, doing)
                with replacing(path) as temporary:
                    np.save(temporary, found)
    return np.load(path)


def _counted(total: int, count: Callable[[int], Any], doing: str) -> np.ndarray:
    chunks = _Chunks(total, count)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # the function to run is a closure, which only a fork can hand over
    workers = min(cores, MAX_WORKERS, len(chunks)) if len(chunks) > 4 and "fork" in get_all_start_methods() else 0
    loader = DataLoader(
        chunks, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    found: list[Any] = []
    with tqdm(total=total, desc=doing, unit="record", disable=not workers) as bar:
        for part in loader:
            values = json.loads(part)
            bar.update(len(values))
            found += values
    if found and isinstance(found[0], list):
        found = [pair for values in found for pair in values]
    return np.array(found, dtype=np.int32)
