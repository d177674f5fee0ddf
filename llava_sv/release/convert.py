"""`llava-sv convert`: one checkpoint in, another form of it out. Each flag names a conversion; its module does it."""

from __future__ import annotations

import argparse
import sys

from llava_sv.errors import UserError, exit_on_user_error

EXAMPLE = """examples: resume on 4 devices what 8 were training under DeepSpeed; merge adapters into their base
  llava-sv convert --universal checkpoints/llava/checkpoint-1000
  llava-sv convert --merge-lora checkpoints/my-lora --output checkpoints/my-model"""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a `UserError` of one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see llava-sv convert --help")


def parser() -> argparse.ArgumentParser:
    """The command's flags; exactly one of the first group says what is done."""
    built = Parser(
        prog="llava-sv convert",
        description="Convert a checkpoint. What is there stays; what is made appears when it is complete.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = built.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--universal",
        metavar="CHECKPOINT",
        help="OUTPUT/checkpoint-N of a DeepSpeed run: add a copy that any number of processes, and any ZeRO stage, "
        "can resume from",
    )
    what.add_argument("--merge-lora", metavar="ADAPTER", help="adapters of a LoRA run, to a whole checkpoint")
    merging = built.add_argument_group("with --merge-lora")
    merging.add_argument("--base", help="the model they were trained on (default: the one that the folder remembers)")
    merging.add_argument("--output", help="folder to write")
    merging.add_argument("--force", action="store_true", help="replace --output where it exists")
    return built


def main(argv: list[str] | None = None) -> int:
    """Run the conversion that `argv` asks for; returns the exit code. Raises `UserError`."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if args.universal:
        if args.base or args.output or args.force:
            raise UserError("--base, --output and --force go with --merge-lora; --universal adds to the checkpoint")
        from llava_sv.train.universal import convert

        print(f"done: {convert(args.universal)}")
        return 0
    if not args.output:
        raise UserError("--merge-lora needs --output, the folder to write")
    from llava_sv.release.merge_lora import merge_lora

    merge_lora(args.merge_lora, args.base, args.output, args.force)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
