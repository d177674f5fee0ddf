"""`llava-sv convert`: one checkpoint in, another form of it out. Each flag names a conversion; its module does it."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any, get_args

from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import check_can_write, write_json
from llava_sv.release.flags import DTYPES, Parser, shard_bytes
from llava_sv.release.plan import LAYOUTS

EXAMPLE = """examples: a checkpoint of transformers' layout to this project's, and back; a dense one made to skip
  llava-sv convert llava-hf/llava-1.5-7b-hf --to sv --out checkpoints/llava-1.5-7b
  llava-sv convert checkpoints/llava-1.5-7b --to hf --out checkpoints/llava-1.5-7b-hf
  llava-sv convert checkpoints/llava-1.5-7b-hf --to sv --sv_num_retained 64 --sv_num_skipped 156 --out checkpoints/skip
examples: resume on 4 devices what 8 were training under DeepSpeed; merge adapters into their base
  llava-sv convert --universal checkpoints/llava/checkpoint-1000
  llava-sv convert --merge-lora checkpoints/my-lora --output checkpoints/my-model"""

TERMINATED = 143
"""Exit code of a conversion that was asked to end."""


def parser() -> argparse.ArgumentParser:
    """The command's flags; SRC with --to, or exactly one of the flags of the first group, says what is done."""
    built = Parser(
        prog="llava-sv convert",
        description="Convert a checkpoint. What is there stays; what is made appears when it is complete.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    built.add_argument("source", nargs="?", metavar="SRC", help="with --to: a checkpoint's folder or Hugging Face id")
    what = built.add_mutually_exclusive_group()
    what.add_argument("--to", choices=LAYOUTS, help="layout to write: this project's, transformers' own, or LLaVA's")
    what.add_argument(
        "--universal",
        metavar="CHECKPOINT",
        help="OUTPUT/checkpoint-N of a DeepSpeed run: add a copy that any number of processes, and any ZeRO stage, "
        "can resume from",
    )
    what.add_argument("--merge-lora", metavar="ADAPTER", help="adapters of a LoRA run, to a whole checkpoint")
    _add_flags(built)
    _add_skipping(built.add_argument_group("with --to sv, of a dense checkpoint: make it skip (as in training)"))
    return built


def _add_flags(built: argparse.ArgumentParser) -> None:
    both = built.add_argument_group("with --to and --merge-lora")
    both.add_argument("--out", "--output", dest="out", metavar="DIR", help="folder to write")
    both.add_argument("--force", action="store_true", help="replace --out where it exists")
    both.add_argument(
        "--base", help="language model or checkpoint under a projector or adapters (default: what they remember)"
    )
    layouts = built.add_argument_group("with --to")
    layouts.add_argument("--dtype", choices=DTYPES, help="store weights so [as they are]")
    layouts.add_argument("--shard-size", metavar="SIZE", help="most bytes of a file, such as 5GB [files as they are]")
    layouts.add_argument("--no-check", action="store_true", help="do not compare weights, logits and answers")
    layouts.add_argument("--json", metavar="FILE", help="write what was done")
    layouts.add_argument("--drop-skip", action="store_true", help="a checkpoint that skips: its dense model")
    layouts.add_argument(
        "--conv-template", metavar="NAME", help="conversation template that the model was trained with"
    )
    layouts.add_argument(
        "--vision-tower", metavar="PATH", help="LLaVA's layout: where the encoder is that config.json names"
    )


def _add_skipping(group: Any) -> None:
    for field in _skip_fields():
        kind = next(one for one in get_args(_types()[field.name]) if one is not type(None))
        group.add_argument(
            f"--{field.name}", type=_bool if kind is bool else kind, help=field.metadata["help"].replace("%", "%%")
        )


def _skip_fields() -> list[Any]:
    from llava_sv.arguments import ModelArguments

    return [field for field in dataclasses.fields(ModelArguments) if field.name.startswith("sv_")]


def _types() -> dict[str, Any]:
    from typing import get_type_hints

    from llava_sv.arguments import ModelArguments

    return get_type_hints(ModelArguments)


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


def main(argv: list[str] | None = None) -> int:
    """Run the conversion that `argv` asks for; returns the exit code. Raises `UserError`."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if args.universal or args.merge_lora:
        _refuse_others(args)
    if args.universal:
        if args.base or args.out or args.force:
            raise UserError("--base, --output and --force go with --merge-lora; --universal adds to the checkpoint")
        from llava_sv.train.universal import convert

        print(f"done: {convert(args.universal)}")
        return 0
    if args.merge_lora:
        if not args.out:
            raise UserError("--merge-lora needs --output, the folder to write")
        from llava_sv.release.merge_lora import merge_lora

        merge_lora(args.merge_lora, args.base, args.out, args.force)
        return 0
    return _convert(args)


def _refuse_others(args: argparse.Namespace) -> None:
    """`UserError` for flags of --to beside another conversion."""
    default = vars(parser().parse_args([]))
    own = {"universal", "merge_lora", "base", "out", "force"}
    given = [name for name, value in vars(args).items() if name not in own and value != default[name]]
    if given:
        flag = given[0] if given[0].startswith("sv_") else given[0].replace("_", "-")
        flag = "SRC" if flag == "source" else f"--{flag}"
        raise UserError(f"{flag} goes with --to; drop it")


def _convert(args: argparse.Namespace) -> int:
    if not args.to or not args.source:
        lacks = "SRC, the checkpoint to convert" if args.to else "--to, the layout to write"
        if not args.to and not args.source:
            raise UserError(
                "one of the arguments --universal --merge-lora is required, or SRC with --to; "
                "see llava-sv convert --help"
            )
        raise UserError(f"{'--to' if args.to else args.source}: needs {lacks}; see llava-sv convert --help")
    if not args.out:
        raise UserError("--to needs --out, the folder to write")
    if args.json:
        check_can_write("--json", Path(args.json))
    from llava_sv.release.converting import Options, convert_checkpoint, said
    from llava_sv.release.source import local_folder

    options = Options(
        source=local_folder(args.source),
        to=args.to,
        out=Path(args.out),
        force=args.force,
        dtype=args.dtype,
        shard_bytes=shard_bytes(args.shard_size) if args.shard_size is not None else None,
        check=not args.no_check,
        drop_skip=args.drop_skip,
        conv_template=args.conv_template,
        vision_tower=args.vision_tower,
        base=args.base,
        skip_vision=_skip_vision(args),
    )
    with _ending_in_order():
        report = convert_checkpoint(options)
    if args.json:
        write_json(Path(args.json), report)
    print("\n".join(said(report)))
    return 0


def _skip_vision(args: argparse.Namespace) -> dict[str, Any]:
    from llava_sv.arguments import ModelArguments

    given = {field.name: getattr(args, field.name) for field in _skip_fields()}
    arguments = ModelArguments(**{name: value for name, value in given.items() if value is not None})
    return arguments.given_skip_vision()


class _ending_in_order:
    """Inside, a request to end (SIGTERM) lets folders that are half made be removed on the way out."""

    def __enter__(self) -> None:
        def end(*_: Any) -> None:
            raise SystemExit(TERMINATED)

        try:
            self.before = signal.signal(signal.SIGTERM, end)
        except ValueError:  # not the main thread: nobody sends it signals
            self.before = None

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
