"""`llava-sv convert`: one checkpoint in, another form of it out. Each flag names a conversion; its module does it."""

from __future__ import annotations

import argparse
import sys

from llava_sv.errors import UserError, exit_on_user_error

EXAMPLE = """example: resume on 4 devices what 8 were training under DeepSpeed
  llava-sv convert --universal checkpoints/llava/checkpoint-1000
  NPROC=4 bash scripts/v1_5/finetune_skip.sh"""


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a `UserError` of one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see llava-sv convert --help")


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    built = Parser(
        prog="llava-sv convert",
        description="Convert a checkpoint.",
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
    return built


def main(argv: list[str] | None = None) -> int:
    """Run the conversion that `argv` asks for; returns the exit code."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    if args.universal:
        from llava_sv.train.universal import convert

        print(f"done: {convert(args.universal)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main))
