"""`llava-sv <command>`: a table of name -> function. The command line arrives, the command's exit code leaves.

The installed `llava-sv` script calls `main`. A command's module is imported only when it is the one that runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass

from llava_sv.errors import exit_on_any_trouble, exit_on_user_error


@dataclass(frozen=True)
class Command:
    """One line of the table."""

    target: str
    """`module:function`; the function takes the remaining arguments and returns an exit code."""
    summary: str
    """What it does, in a few words."""


COMMANDS: dict[str, Command] = {
    "doctor": Command("llava_sv.doctor:main", "say what this machine has, what is missing and how to get it"),
    "doctor --plan": Command("llava_sv.train.memory_plan:plan_main", "say what a training command needs of memory"),
    "data toy": Command("llava_sv.data.toy:main", "draw the toy images, conversations and benchmark"),
    "data check": Command("llava_sv.data.check:check_main", "check a LLaVA data file before training on it"),
    "data index": Command("llava_sv.data.commands:index_main", "build the memory-mapped index of a data file"),
    "data stats": Command("llava_sv.data_stats:main", "count records by task group, lengths before and after skipping"),
    "data mix": Command("llava_sv.data.mix:main", "make a mixture (SV-1M, ...) from its sources, or list them"),
    "data convert": Command("llava_sv.data.convert_source:main", "turn one source into a LLaVA JSON file"),
    "data shard": Command("llava_sv.data.shard:shard_main", "pack records and images into tar or parquet shards"),
    "train": Command("llava_sv.train.train:main", "pretrain or fine-tune (scripts/v1_5/*.sh call this for you)"),
    "convert": Command(
        "llava_sv.release.convert:main",
        "a checkpoint to another layout (transformers', LLaVA's), merged, or for other devices",
    ),
    "release": Command("llava_sv.release.release:main", "make a folder of a checkpoint that others load and check"),
    "verify": Command("llava_sv.release.verify:main", "check a downloaded release, file by file and tensor by tensor"),
    "zoo": Command("llava_sv.release.zoo:main", "list the model zoo: the paper's tables as recipes, their cost"),
    "chat": Command("llava_sv.serve.cli:main", "talk with a model about an image"),
    "eval": Command("llava_sv.eval.cli:main", "score a model on a benchmark, and time it"),
    "flops": Command("llava_sv.bench.flops:main", "count FLOPs of a setting, as the paper does and exactly"),
    "bench train": Command("llava_sv.bench.train:main", "time a training step, dense against skipping"),
    "bench infer": Command("llava_sv.bench.infer:main", "time prefill and decode, and read the KV cache's bytes"),
    "bench sweep": Command("llava_sv.bench.sweep:main", "time both over a grid of batches, lengths and budgets"),
    "bench data": Command("llava_sv.bench.data:main", "index millions of records, open them, read them, load pictures"),
    "bench memory": Command("llava_sv.bench.memory:main", "plan the memory of small runs, measure it, compare"),
    "analyze ffn-impact": Command("llava_sv.analysis.ffn_impact:main", "how much the FFN changes each kind of token"),
    "analyze flops-share": Command("llava_sv.analysis.flops_share:main", "the FLOPs of visual tokens by their number"),
    "analyze similarity": Command("llava_sv.analysis.similarity:main", "how alike the visual tokens of a scale are"),
    "analyze tradeoff": Command("llava_sv.analysis.tradeoff:main", "accuracy against FLOPs at several budgets"),
    "analyze error-bound": Command("llava_sv.analysis.error_bound:main", "the error of skipping against its bounds"),
    "analyze layer-plan": Command("llava_sv.analysis.layer_plan:main", "which layers to skip for an error budget"),
    "analyze attention": Command("llava_sv.analysis.attention:main", "what generated tokens attend to, and where"),
}


def usage(group: str = "") -> str:
    """The help text: every command with its summary, or those of one `group` (such as `data`)."""
    chosen = {name: command for name, command in COMMANDS.items() if name.startswith(group and f"{group} ")}
    width = max(map(len, chosen))
    lines = ["usage: llava-sv <command> [options]", "", "commands:"]
    lines += [f"  {name:<{width}}  {command.summary}" for name, command in chosen.items()]
    lines += ["", "Each command has --help with an example, such as: llava-sv chat --help"]
    return "\n".join(lines)


def resolve(argv: list[str]) -> tuple[str | None, list[str]]:
    """(name of the command, its arguments); the name is None where no command matches."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in COMMANDS:
            return name, argv[words:]
    return None, argv


def _group(word: str) -> list[str]:
    """Names of the commands that begin with `word` and a space."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def _unknown(argv: list[str]) -> int:
    """Say that there is no such command, and which ones there are."""
    subcommands = _group(argv[0])
    tried = " ".join(argv[: 2 if subcommands else 1])
    print(f"error: unknown command {tried!r}; known: {', '.join(subcommands or COMMANDS)}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code (2 for a user's mistake)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from llava_sv import __version__

        print(f"llava-sv {__version__}")
        return 0
    if argv[0] not in COMMANDS and _group(argv[0]) and argv[1:] in (["-h"], ["--help"]):
        print(usage(argv[0]))
        return 0
    name, rest = resolve(argv)
    if name is None:
        return _unknown(argv)
    if name != "train" and not sys.stderr.isatty():  # bars of models being fetched and loaded are for a terminal
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    guard = exit_on_user_error if name == "train" else exit_on_any_trouble  # training tells its own ends
    return guard(_run, COMMANDS[name], rest)


def _run(command: Command, rest: list[str]) -> int | None:
    module, function = command.target.split(":")
    return getattr(importlib.import_module(module), function)(rest)


if __name__ == "__main__":
    sys.exit(main())
