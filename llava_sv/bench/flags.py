"""What `bench train`, `bench infer` and `bench sweep` share on the command line: flags in, a checked `Job` out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_sv.bench import clock
from llava_sv.bench.models import make_config, skip_block
from llava_sv.bench.presets import FAMILIES
from llava_sv.bench.sizes import DTYPE_NAMES, SIZES, BenchSize, find_dtype, find_size, resized
from llava_sv.errors import UserError
from llava_sv.files import check_can_write, keep_existing, write_json, write_text
from llava_sv.model.loading import check_config


@dataclass(frozen=True)
class Job:
    """One measurement: a size on a device. `new_tokens`: answers' lengths, rising; empty for training."""

    name: str
    """The size's name, as asked."""
    size: BenchSize
    device: torch.device
    dtype: torch.dtype
    repeats: int
    with_peers: bool
    new_tokens: tuple[int, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is measured, as JSON has it."""
        size = self.size
        return {
            "size": self.name,
            "family": size.family,
            "layers": size.llm.num_hidden_layers,
            "batch": size.batch,
            "text_tokens": size.text_tokens,
            "num_retained": size.num_retained,
            "num_skipped": size.num_skipped,
            "new_tokens": list(self.new_tokens),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "repeats": self.repeats,
            "peers": self.with_peers,
        }

    @property
    def label(self) -> str:
        """For a message: the size, and how much of it."""
        slice_of = f", {self.size.layers_text}" if self.size.layers_text else ""
        return f"--size {self.name}, family {self.size.family}{slice_of}, batch {self.size.batch}"


def make_parser(command: str, description: str, epilog: str, several: bool = False) -> argparse.ArgumentParser:
    """The flags that all three share. several: those of the grid take lists."""
    parser = argparse.ArgumentParser(
        prog=f"llava-sv bench {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count: Callable[[str], Any] = str if several else int
    metavar, each = ("N,...", "; or several, 1,2,4") if several else ("N", "")
    families = ", ".join(FAMILIES)
    parser.add_argument("--size", default="cpu", help=f"{', '.join(SIZES)} (default cpu)")
    parser.add_argument(
        "--family", default="llava", help=f"{families} (default llava){' or several' if several else ''}"
    )
    for flag, text in (
        ("--layers", "a slice of the model: so many of its decoder layers (default: the size's)"),
        ("--batch", "samples, each with one image (default: the size's)"),
        ("--text-tokens", "text tokens of a sample (default: the size's)"),
        ("--num-retained", "Nr: visual tokens that pass the FFN (default: the size's)"),
        ("--num-skipped", "Ns: visual tokens that skip it (default: the size's)"),
    ):
        parser.add_argument(flag, type=count, metavar=metavar, help=text + each)
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds that are measured (default: the size's)")
    parser.add_argument("--dtype", default="bf16", help=f"{', '.join(DTYPE_NAMES)} (default bf16)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers' own models out")
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    parser.add_argument("--markdown", metavar="FILE", help="write the table here, as Markdown")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist already")
    return parser


def counts(flag: str, text: Any, least: int = 1) -> list[int]:
    """`"16,64,256"` -> [16, 64, 256]; `UserError` for anything else."""
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"{flag} {text}: expected whole numbers, such as 16 or 16,64,256")
    if min(map(int, parts)) < least:
        raise UserError(f"{flag} {text}: expected {least} or more")
    return sorted({int(part) for part in parts})


def answer_lengths(text: str | None, size: BenchSize) -> tuple[int, ...]:
    """`--new-tokens`, or the size's own."""
    if text is None:
        return (size.new_tokens,)
    found = counts("--new-tokens", text, least=0)
    if found[0] < 2:
        raise UserError(f"--new-tokens {text}: at least 2 are needed, the first belongs to prefill")
    return tuple(found)


def read_job(args: argparse.Namespace, new_tokens: str | None = None, infer: bool = False) -> Job:
    """The measurement that the arguments ask for, checked."""
    size = resized(
        find_size(args.size, args.family),
        layers=args.layers,
        batch=args.batch,
        text_tokens=args.text_tokens,
        num_retained=args.num_retained,
        num_skipped=args.num_skipped,
    )
    lengths = answer_lengths(new_tokens, size) if infer else ()
    return make_job(args, size, lengths)


def make_job(args: argparse.Namespace, size: BenchSize, new_tokens: tuple[int, ...]) -> Job:
    """A `Job` of a size that is settled; `UserError` for a budget that the image cannot give."""
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: at least one round is needed")
    dtype, device = find_dtype(args.dtype), clock.pick_device(args.device)
    check_budget(size)
    return Job(args.size, size, device, dtype, args.repeats or size.repeats, not args.no_peers, new_tokens)


def check_budget(size: BenchSize) -> None:
    """`UserError`, the config's own, where the budget does not go with the image's tokens."""
    config = make_config(size, skip_block(size))
    check_config(config, config.vision_config or {})


def check_outputs(args: argparse.Namespace, *flags: str) -> None:
    """`UserError` before any work for a file that exists and may not be replaced, or cannot be written."""
    for flag in flags:
        path = getattr(args, flag.removeprefix("--"))
        keep_existing(path, args.overwrite, flag)
        if path is not None:
            check_can_write(flag, Path(path))


def finish(args: argparse.Namespace, report: dict[str, Any], text: str, markdown: str) -> int:
    """Write the report where asked, then print it: nobody who stops reading loses a file."""
    if args.json:
        write_json(args.json, report)
    if args.markdown:
        write_text(args.markdown, markdown + "\n")
    print(text)
    return 0


def head_of(job: Job) -> dict[str, Any]:
    """How every report begins."""
    size = job.size
    return {
        "size": job.name,
        "family": size.family,
        "layers": size.llm.num_hidden_layers,
        "all_layers": size.all_layers or size.llm.num_hidden_layers,
        "slice": size.layers_text or None,
        "settings": job.settings,
    }


def title(report: dict[str, Any]) -> str:
    """One line that says what was run."""
    asked = report["settings"]
    parts = [f"size {report['size']}", report["family"], *([report["slice"]] if report["slice"] else [])]
    parts += [f"batch {asked['batch']}", f"{asked['text_tokens']} text tokens"]
    return ", ".join([*parts, f"{asked['num_retained']} retained + {asked['num_skipped']} skipped"])


class OutOfMemory(UserError):
    """Memory ran out while it was measured."""


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory."""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "out of memory" in said)
    )


def within_memory(job: Job, what: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`run`'s report; memory that runs out after all, the estimate notwithstanding, becomes one line."""
    try:
        return run()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    raise OutOfMemory(
        f"{job.label}: bench {what} ran out of memory; take fewer --layers, a smaller --batch, or --no-peers"
    )
