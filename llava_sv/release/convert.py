"""`llava-sv convert`: one kind of checkpoint in, another out. Only flags and dispatch; each conversion has its module.

Called by `llava_sv.cli`.
"""

from __future__ import annotations

import argparse


def build_parser() -> argparse.ArgumentParser:
    """All flags of `llava-sv convert`; exactly one of the first group says what is done."""
    parser = argparse.ArgumentParser(
        prog="llava-sv convert",
        description="Convert a checkpoint. What is there stays; --output appears when it is complete.",
        epilog="example: llava-sv convert --merge-lora checkpoints/my-lora --output checkpoints/my-model",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge-lora", metavar="ADAPTER", help="adapters of a LoRA run, to a whole checkpoint")
    parser.add_argument("--base", help="the model they were trained on (default: the one that the folder remembers)")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace --output where it exists")
    return parser


def main(argv: list[str]) -> int:
    """`llava-sv convert`. Returns the exit code; raises `UserError`."""
    args = build_parser().parse_args(argv)
    from llava_sv.release.merge_lora import merge_lora

    merge_lora(args.merge_lora, args.base, args.output, args.force)
    return 0
