"""`llava-sv data check | index`: look at a data file before training on it. Called by `llava_sv.cli`.

A command line arrives, an exit code leaves: 0, or 2 where `check` found problems. `UserError` travels to the caller.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_sv.data.index import open_index
from llava_sv.data.json_stream import read_values
from llava_sv.data.records import check_record
from llava_sv.errors import UserError
from llava_sv.files import write_json
from llava_sv.mm_utils import ImageError, load_image

IMAGE_THREADS = 8
IMAGES_AT_ONCE = 512


def _parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"llava-sv data {command}",
        description=description,
        epilog=f"example: llava-sv data {command} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="FILE", help="LLaVA records, a JSON array or JSONL")
    parser.add_argument("--json", metavar="FILE", help="write the report there too, as JSON")
    return parser


# -- check ------------------------------------------------------------------------------------------------------------


class _Problems:
    """Problems found: all are counted by kind, the first `limit` are kept to be shown."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.shown: list[str] = []
        self.counts = {"malformed": 0, "record": 0, "missing_image": 0, "corrupt_image": 0}

    def add(self, kind: str, message: str) -> None:
        self.counts[kind] += 1
        if len(self.shown) < self.limit:
            self.shown.append(message)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def check_main(argv: list[str]) -> int:
    """Check every record and every picture of a file; all problems are counted and the first ones listed."""
    parser = _parser(
        "check",
        "Check every record of a data file, and open every picture it names.",
        "playground/data/toy/sft.json --image-folder playground/data/toy/images",
    )
    parser.add_argument("--image-folder", metavar="DIR", help="folder that the records' image paths start from")
    parser.add_argument("--no-images", action="store_true", help="check the records only, open no picture")
    parser.add_argument("--max-problems", type=int, default=20, metavar="N", help="list so many problems [20]")
    args = parser.parse_args(argv)
    problems = _Problems(args.max_problems)
    report = _check(Path(args.data), _image_folder(args), problems)
    for message in problems.shown:
        print(message)
    if problems.total > len(problems.shown):
        print(f"... and {problems.total - len(problems.shown)} more (--max-problems {problems.total} lists all)")
    print(_check_summary(report, problems))
    if args.json:
        write_json(args.json, {**report, "problems": problems.total, **problems.counts, "messages": problems.shown})
    return 2 if problems.total else 0


def _image_folder(args: argparse.Namespace) -> Path | None:
    """Where to look for pictures; None: not at all."""
    if args.no_images:
        return None
    if args.image_folder is None:
        raise UserError("say where the pictures are with --image-folder DIR, or pass --no-images to leave them out")
    folder = Path(args.image_folder)
    if not folder.is_dir():
        raise UserError(f"no such image folder: {folder}")
    return folder


def _check(path: Path, folder: Path | None, problems: _Problems) -> dict[str, Any]:
    began = time.perf_counter()
    images: dict[str, str] = {}
    good = 0
    for line, value in _with_bar(path, lambda error: problems.add("malformed", str(error))):
        where = f"{path} line {line}"
        try:
            record = check_record(value, where)
        except UserError as error:
            problems.add("record", str(error))
            continue
        good += 1
        for image in record.images:
            images.setdefault(image, f"{where}: record {record.id!r}")
    if not good and not problems.total:
        problems.add("record", f"{path}: holds no records")
    if folder is not None:
        _open_images(folder, images, problems)
    return {
        "file": str(path),
        "good_records": good,
        "image_files": len(images),
        "images_opened": folder is not None,
        "seconds": time.perf_counter() - began,
    }


def _with_bar(path: Path, on_error: Callable[[UserError], Any]) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise UserError(f"no such data file: {path}")
    with tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True) as bar:
        yield from read_values(path, progress=bar.update, on_error=on_error)


def _open_images(folder: Path, images: dict[str, str], problems: _Problems) -> None:
    """Open each picture once, a few at a time; `images`: path -> the record that names it first."""

    def problem(image: str) -> ImageError | None:
        try:
            load_image(folder / image)
        except ImageError as error:
            return error
        return None

    names = list(images)
    with ThreadPoolExecutor(IMAGE_THREADS) as pool, tqdm(total=len(names), desc="opening images", unit="image") as bar:
        for start in range(0, len(names), IMAGES_AT_ONCE):
            some = names[start : start + IMAGES_AT_ONCE]
            for image, error in zip(some, pool.map(problem, some)):
                bar.update()
                if error is not None:
                    problems.add(f"{error.kind}_image", f"{images[image]}: {error}")


def _check_summary(report: dict[str, Any], problems: _Problems) -> str:
    found = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in problems.counts.items() if count)
    return (
        f"{report['file']}: {report['good_records']} good records, {report['image_files']} image files "
        f"{'opened' if report['images_opened'] else 'not opened'}, "
        f"{problems.total} problem{'' if problems.total == 1 else 's'}{f' ({found})' if found else ''}"
    )


# -- index ------------------------------------------------------------------------------------------------------------


def index_main(argv: list[str]) -> int:
    """Make the index of a file (or find it made), so that training starts at once."""
    parser = _parser(
        "index",
        "Check a data file and lay it out for memory-mapped reading; training does so by itself on first use.",
        "playground/data/toy/sft.json",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="where to keep it [datasets' cache, where training looks]")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that make it [one a core, at most 8]")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: expected 1 or more, got {args.workers}")
    began = time.perf_counter()
    if Path(args.data).is_dir():  # of shards
        records = open_records(args.data, args.cache_dir)
    else:
        records = open_index(args.data, args.cache_dir, args.workers)
    report = {
        "file": args.data,
        "index": str(records.index_path),
        "records": len(records),
        "bytes": records.index_path.stat().st_size,
        "seconds": time.perf_counter() - began,
    }
    print(f"{args.data}: {report['records']} records, indexed in {report['index']} ({report['seconds']:.1f} s)")
    if args.json:
        write_json(args.json, report)
    return 0
