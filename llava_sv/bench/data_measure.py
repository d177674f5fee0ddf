"""One measurement of `llava-sv bench data`, in a process of its own: `python -m llava_sv.bench.data_measure WHAT ...`.

Prints its figures as one line of JSON. Called by `bench.data`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

READS = 200_000
"""Records read at random."""

BATCH, PROCESSES = 16, 8
"""Of the run whose order by length is made."""


def _rss() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def build(data: str, cache: str, workers: str) -> dict[str, Any]:
    """Make the index of `data`."""
    from llava_sv.data.index import open_index
    from llava_sv.data.index_build import how_many

    count = how_many(Path(data), int(workers) or None)
    began = time.perf_counter()
    records = open_index(data, cache, count)
    return {"seconds": time.perf_counter() - began, "index": str(records.index_path), "workers": count}


def open_(index: str) -> dict[str, Any]:
    """Open an index, and read its first and its last record."""
    from llava_sv.data.index import open_records

    before, began = _rss(), time.perf_counter()
    records = open_records(index)
    records[0], records[-1]
    return {"open_seconds": time.perf_counter() - began, "open_rss_bytes": _rss() - before}


def at_random(index: str, seed: str) -> dict[str, Any]:
    """Read records in random order, each a whole `LlavaRecord`."""
    from llava_sv.data.index import open_records

    records, rng = open_records(index), random.Random(int(seed))
    wanted = [rng.randrange(len(records)) for _ in range(READS)]
    began = time.perf_counter()
    for one in wanted:
        records[one]
    return {"random_records_per_second": READS / (time.perf_counter() - began)}


def json_load(path: str) -> dict[str, Any]:
    """What LLaVA does: the whole file in memory."""
    before, began = _rss(), time.perf_counter()
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    found = {"seconds": time.perf_counter() - began, "rss_bytes": _rss() - before}
    return found if values else {}


def order(index: str, seed: str) -> dict[str, Any]:
    """Estimate lengths from characters, and walk through the order of an epoch by length and modality."""
    import resource

    from llava_sv.data.index import open_records
    from llava_sv.data.sampler import LengthGroupedSampler

    records = open_records(index)
    unit = 1024 if sys.platform != "darwin" else 1
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, time.perf_counter()
    lengths = records.num_chars // 4
    sampler = LengthGroupedSampler(BATCH, PROCESSES, lengths, records.modality, int(seed))
    walked = sum(1 for _ in sampler)
    seconds = time.perf_counter() - began
    assert walked == len(records)
    return {
        "order_seconds": seconds,
        "order_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before,
    }


def loader(folder: str, seed: str) -> dict[str, Any]:
    """See `bench.data_loader`."""
    from llava_sv.bench.data_loader import measure_loader

    return measure_loader(Path(folder), int(seed))


WHAT: dict[str, Callable[..., dict[str, Any]]] = {
    "build": build,
    "open": open_,
    "random": at_random,
    "json": json_load,
    "order": order,
    "loader": loader,
}


if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]](*sys.argv[2:])))
