"""`llava-sv release`: a checkpoint to a folder that others can load, check and trust; made whole or not at all.

Flags come in; the folder, a report and perhaps an upload go out. The parts: `releasable` (what was given), `assemble`
(the files), `smoke` (the proof that it loads and answers alike), `hub` (the upload).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from llava_sv.errors import NoRoom, UserError
from llava_sv.files import check_can_write, keep_existing, write_json
from llava_sv.release import card_flags, hub, manifest
from llava_sv.release.flags import DTYPES, Parser, shard_bytes
from llava_sv.release.folders import check_output, replacing_folder

SENDING = ("checkpoint", "out", "push_to_hub", "upload", "public", "json", "overwrite")
"""What a release that is pushed, and not made, has to do with."""

EXAMPLE = """examples: release a run with its evaluation; look at what an upload would send; send it
  llava-sv release checkpoints/llava-v1.5-skip --out releases/llava-sv-7b --eval results/bench.json --license apache-2.0
  llava-sv release releases/llava-sv-7b --push-to-hub my-lab/llava-sv-7b
  llava-sv release releases/llava-sv-7b --push-to-hub my-lab/llava-sv-7b --upload"""


def build_parser() -> argparse.ArgumentParser:
    """All flags of `llava-sv release`."""
    parser = Parser(
        prog="llava-sv release",
        description="Make a folder of a checkpoint that others load by transformers' Auto classes, with llava_sv or "
        "without: safetensors, settings, tokenizer, processor, code, model card, checksums. A test loads it in clean "
        "processes and compares logits before it appears. The same checkpoint gives the same bytes.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a folder that training wrote: OUTPUT, OUTPUT/checkpoint-N, or LoRA adapters, which are merged; or, with "
        "--push-to-hub and without --out, a release",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace DIR where it exists")
    parser.add_argument("--base", metavar="MODEL", help="base of LoRA adapters (default: the one that they remember)")
    parser.add_argument("--dtype", choices=DTYPES, help="type to store weights in (default: the checkpoint's)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="most of a file of weights (default: 5GB)")
    parser.add_argument(
        "--conv-template", metavar="NAME", help="conversation template, where the checkpoint names none"
    )
    card_flags.add_flags(parser)
    push = parser.add_argument_group("a hub")
    push.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help=f"say what would be uploaded; nothing is without {hub.GO}"
    )
    push.add_argument(hub.GO, action="store_true", help="really upload, by the login of hf auth login")
    push.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    test = parser.add_argument_group("the test")
    test.add_argument("--no-smoke-test", action="store_true", help="do not load the release before it appears")
    test.add_argument("--device", default="cpu", help="where the test runs (default: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write what was done there: files, the test's figures, notes")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json where it exists")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """`UserError` for flags that do not go together, before anything heavy is imported."""
    if args.push_to_hub:
        hub.check_name(args.push_to_hub)
    elif args.upload or args.public:
        raise UserError(f"{hub.GO if args.upload else '--public'} goes with --push-to-hub OWNER/NAME")
    if args.out is None and not args.push_to_hub:
        raise UserError("--out DIR is needed: the folder to write")
    if args.out is None:
        parser = build_parser()
        idle = [name for name, value in vars(args).items() if name not in SENDING and value != parser.get_default(name)]
        if idle:
            raise UserError(f"--{idle[0].replace('_', '-')} goes with --out DIR: what is pushed is sent as it is")
    card_flags.check(args)
    if args.json:
        keep_existing(args.json, args.overwrite)
        check_can_write("--json", Path(args.json))


def main(argv: list[str]) -> int:
    """`llava-sv release CHECKPOINT --out DIR`."""
    args = build_parser().parse_args(argv)
    size = shard_bytes(args.shard_size)
    check_flags(args)
    if args.out is None:
        if not (Path(args.checkpoint) / manifest.NAME).is_file():
            raise UserError(
                f"{args.checkpoint}: is no release (no {manifest.NAME}); make one with --out DIR, then push it"
            )
        report: dict[str, Any] = {"folder": args.checkpoint}
    else:
        report = make_release_or_say(args, size)
    try:
        if args.push_to_hub:
            report["push"] = hub.push(Path(report["folder"]), args.push_to_hub, args.public, args.upload)
    finally:  # the folder stays, whatever the hub says
        if args.json:
            write_json(args.json, report)
    return 0


def make_release_or_say(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """`make_release`; where the test fails, what its process said goes to `args.json`."""
    try:
        return make_release(args, size)
    except UserError as error:
        log = getattr(error, "log", None)
        if args.json and log is not None:
            write_json(args.json, {"folder": None, "error": str(error), "log": log.splitlines()})
        raise


def make_release(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Make `args.out`; returns the report. Raises `UserError`, and then there is no `args.out`."""
    from llava_sv.generation import find_device
    from llava_sv.release.assemble import Content, config_values, write_release
    from llava_sv.release.portable import paths_said
    from llava_sv.release.releasable import check_source, default_name, whole_checkpoint

    given, out = Path(args.checkpoint), Path(args.out)
    device = "" if args.no_smoke_test else str(find_device(args.device))
    base = check_source(given, args.base)
    needed = {"the checkpoint": str(given), "the current folder": "."} | ({"the base": base} if base else {})
    check_output(out, needed, args.force, "--out")
    if base is None:
        config_values(given, args.dtype, args.conv_template)  # what is wrong is said before anything is written
    check_room(out, Path(base or given), 2 if base else 1)  # what merging makes lies beside it for a while
    name = args.name or default_name(given)
    print(f"{name}: releasing {given}" + (f", its adapters merged into {base}" if base else ""), flush=True)
    with whole_checkpoint(given, base, out.absolute().parent) as source, replacing_folder(out) as folder:
        content = Content(source, name, args.dtype, size, args.conv_template, lambda: card_of(args, source, name))
        listed = write_release(folder, content)
        home = [Path.home(), given.absolute(), given.resolve(), Path.cwd()]
        content.notes += paths_said(folder, home)
        tested = None if args.no_smoke_test else test(folder, content, args, device)
        _check_untouched(folder, listed)
    report = {
        "folder": str(out),
        "checkpoint": str(given),
        "base": base,
        "name": name,
        "files": {file: entry["bytes"] for file, entry in listed["files"].items()},
        "bytes": sum(entry["bytes"] for entry in listed["files"].values()),
        "tensors": len(listed["tensors"]),
        "notes": content.notes,
        "smoke_test": tested,
    }
    for note in content.notes:
        print(f"note: {note}")
    print(f"{out}: {len(report['files'])} files, {report['bytes']:,} bytes, {report['tensors']} tensors")
    print(f"check a copy of it with: llava-sv verify {out}")
    return report


def card_of(args: argparse.Namespace, source: Any, name: str) -> Any:
    """The model card of the run that made `source.given`, for the weights that are released."""
    from llava_sv.release.card import make_card
    from llava_sv.release.card_flags import card_options

    return make_card(source.given, card_options(args, source.given, name, source.whole if source.base else None))


def test(folder: Path, content: Any, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """The smoke test of a finished folder against the checkpoint that was given; says how it went."""
    from llava_sv.release.smoke import answer_of, smoke_test
    from llava_sv.release.weights import torch_dtype

    source = content.source
    # adapters are merged in their own precision: in another one, the merged weights are what is to be kept
    asked = source.whole if args.dtype else source.given
    template = _template_of(folder)
    answer = answer_of(
        str(asked), source.base if asked is source.given else None, torch_dtype(args.dtype), device, template
    )
    print("smoke test: loading it in clean processes", flush=True)
    report = smoke_test(folder, answer, device)
    for form, seen in report["forms"].items():
        print(f"  {form}: {seen['class']}, logits differ by {seen['largest_difference']:.3g}, same answer")
    return report


def _template_of(folder: Path) -> str:
    from llava_sv.files import read_json

    return read_json(folder / "config.json", "the release again")["conv_template"]


def _check_untouched(folder: Path, listed: dict[str, Any]) -> None:
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    strange = sorted(there ^ {*listed["files"], manifest.NAME})
    if strange:
        raise UserError(f"release {folder}: {strange[0]} appeared or went while it was tested; nothing was written")


def check_room(out: Path, checkpoint: Path, copies: int = 1) -> None:
    """`NoRoom` where the disk of `out` has less free than so many copies of the checkpoint's weights take."""
    from llava_sv.release.weights import weight_files

    if not checkpoint.is_dir():
        return
    try:
        needed = copies * sum(path.stat().st_size for path in weight_files(checkpoint))
    except UserError:
        return
    there = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise NoRoom(f"--out {out}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; make room")
