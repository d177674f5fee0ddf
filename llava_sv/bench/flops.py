"""`llava-sv flops`: how much work a setting saves, as the paper counts it and exactly. Plain arithmetic; torch is
imported for a checkpoint, and for `--memory`, only.

The command line: flags to a `Question`, its report printed and written. The counting is in `counts`, whose names
callers find here too; the paper's table is in `paper_table`, what is printed in `flops_page`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from llava_sv.bench.answer import REMOVED
from llava_sv.bench.counts import Question, compare, exact_flops, paper_flops, paper_ratio, train_flops
from llava_sv.bench.flops_page import render, render_presets, render_table
from llava_sv.bench.paper_table import paper_table
from llava_sv.bench.presets import (
    FAMILIES,
    LLMS,
    Budget,
    LlmSize,
    Switches,
    check_budget,
    find_budget,
    find_setting,
    read_llm,
)
from llava_sv.bench.sizes import DTYPE_NAMES, dtype_name
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import check_can_write, keep_existing, write_json

__all__ = ["Question", "compare", "exact_flops", "main", "paper_flops", "paper_ratio", "render", "train_flops"]

EXAMPLE = """example:
  llava-sv flops --table
  llava-sv flops --family llava --num-retained 100 --num-skipped 156 --text-tokens 200 --json flops.json
  llava-sv flops --family cos --skip-layers 8-31 --skip-kv fine+skipped --new-tokens 256 --batch 8
  llava-sv flops --model-path checkpoints/llava-skip
  llava-sv flops --model-path checkpoints/llava-hd-skip --image-size 1024x768"""

STAGES = ("sft", "pretrain")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-sv flops",
        description="Count the FLOPs of one sample, skipping over dense: by the paper's formula, and exactly; and the "
        "bytes of its KV-cache and weights. Without a family or a checkpoint: the paper's table (--table).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", action="store_true", help="the paper's four settings, and its Table 1")
    parser.add_argument("--list", action="store_true", help="list families, presets and language models")
    parser.add_argument("--family", help=f"{', '.join(FAMILIES)} (default: the checkpoint's)")
    parser.add_argument("--preset", help="a setting of the family: its encoder, projector and token counts")
    parser.add_argument("--num-retained", type=int, help="Nr: visual tokens that pass the FFN (default: the preset's)")
    parser.add_argument("--num-skipped", type=int, help="Ns: visual tokens that skip it (default: the preset's)")
    parser.add_argument("--dense-tokens", type=int, help="visual tokens without skipping (default: the preset's)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--model-path", metavar="DIR", help="take every size from this checkpoint's config.json")
    sizes.add_argument(
        "--llm-config",
        default="llama-3-8b",
        help=f"language model: {', '.join(LLMS)}, or hidden_size=N,intermediate_size=N,... (default llama-3-8b)",
    )
    parser.add_argument(
        "--image-size", metavar="WxH", help="with --model-path: pixels of the image (default: the most tokens of any)"
    )
    _add_work(parser)
    _add_switches(parser)
    parser.add_argument("--memory", action="store_true", help="trace the peak memory of a prefill and a training step")
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    parser.add_argument("--overwrite", action="store_true", help="replace what --json names, where it exists")
    return parser


def _add_work(parser: argparse.ArgumentParser) -> None:
    """What runs on the model."""
    work = parser.add_argument_group("work")
    work.add_argument("--text-tokens", type=int, default=200, help="text tokens beside the image (default 200)")
    work.add_argument("--supervised-tokens", type=int, help="training: those that carry loss (default: all text)")
    work.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer (default 64)")
    work.add_argument("--batch", type=int, default=1, help="samples at a time: bytes, and FLOPs of the batch (1)")
    work.add_argument("--dtype", default="bf16", help=f"of weights and cache: {', '.join(DTYPE_NAMES)} (default bf16)")
    work.add_argument("--stage", default="sft", help="what trains: sft (the recipe), pretrain (the projector alone)")
    work.add_argument("--gradient-checkpointing", action="store_true", help="training computes decoder layers again")


def _add_switches(parser: argparse.ArgumentParser) -> None:
    """Skip-Vision's switches; what is not given is the preset's or the checkpoint's."""
    switches = parser.add_argument_group("switches of Skip-Vision (default: the preset's, the checkpoint's)")
    switches.add_argument("--skip-layers", metavar="LAYERS", help="decoder layers that skip: all, or 0-3,8,10-31")
    switches.add_argument("--skip-kv", metavar="LEVEL", help=f"KV level after prefill: {', '.join(REMOVED)}")
    off: dict[str, Any] = {"action": "store_const", "const": False}
    switches.add_argument("--no-skip-ffn", dest="skip_ffn", **off, help="skipped tokens pass the FFN as well")
    switches.add_argument("--no-merge", dest="merge", **off, help="skip all that is not retained, without merging")
    switches.add_argument("--no-former-summary", dest="former_summary", **off, help="no summary of retained tokens")
    switches.add_argument("--no-latter-summary", dest="latter_summary", **off, help="no summary of skipped tokens")
    last = "the last skipped token passes the FFN (Table 6, LV)"
    switches.add_argument("--last-visual-ffn", action="store_const", const=True, help=last)


def _switches(args: argparse.Namespace) -> Switches:
    if args.skip_kv is not None and args.skip_kv not in REMOVED:
        raise UserError(f"--skip-kv: unknown level {args.skip_kv!r}; known: {', '.join(REMOVED)}")
    return Switches(**{field.name: getattr(args, field.name) for field in fields(Switches)})


def _question(args: argparse.Namespace) -> Question:
    """The arguments, defaults filled in and checked."""
    question = _of_checkpoint(args) if args.model_path else _of_preset(args)
    if args.dense_tokens is not None:
        question = replace(question, setting=replace(question.setting, dense_tokens=args.dense_tokens))
    if args.stage not in STAGES:
        raise UserError(f"--stage: unknown stage {args.stage!r}; known: {', '.join(STAGES)}")
    question = replace(
        question,
        supervised_tokens=args.text_tokens if args.supervised_tokens is None else args.supervised_tokens,
        new_tokens=args.new_tokens,
        batch=args.batch,
        dtype=dtype_name(args.dtype),
        trains=args.stage,
        recompute=args.gradient_checkpointing,
    )
    _check(question)
    return question


def _of_checkpoint(args: argparse.Namespace) -> Question:
    """Everything from a checkpoint's own config."""
    if args.preset:
        raise UserError("--preset does not go with --model-path: the checkpoint says what its images take")
    size = _image_size(args.image_size) if args.image_size else None
    switches = _switches(args)
    from llava_sv.bench.checkpoint import budget_of, llm_of, parameters_of, read_checkpoint, setting_of

    config = read_checkpoint(args.model_path, args.num_retained, args.num_skipped, switches=switches.given)
    if args.family not in (None, config.mm_family):
        raise UserError(f"--family {args.family}: {args.model_path} is of family {config.mm_family}; leave it out")
    setting, budget = setting_of(config, size), budget_of(config, size)
    question = Question(config.mm_family, None, setting, llm_of(config), budget, args.text_tokens, 0)
    return replace(question, parameters=parameters_of(config), config=config)


def _of_preset(args: argparse.Namespace) -> Question:
    """A preset of `FAMILIES`, with both summaries, merging where it makes fewer tokens."""
    if not args.family:
        raise UserError(f"--family is missing; known: {', '.join(FAMILIES)}; or give --model-path")
    name, setting = find_setting(args.family, args.preset)
    if args.image_size:
        raise UserError("--image-size goes with --model-path: a preset is for one size; say --dense-tokens")
    setting = replace(setting, dense_tokens=args.dense_tokens or setting.dense_tokens)
    switches, llm = _switches(args), read_llm(args.llm_config)
    if args.skip_kv == "fine+skipped" and not setting.windows:
        raise UserError(f"--skip-kv fine+skipped drops a middle scale, and family {args.family} has none; use skipped")
    budget = find_budget(setting, args.num_retained, args.num_skipped, switches)
    return Question(args.family, name, setting, llm, _with_layers(budget, switches, llm), args.text_tokens, 0)


def _with_layers(budget: Budget, switches: Switches, llm: LlmSize) -> Budget:
    """The number of layers that skip, read as a checkpoint's config reads it."""
    if switches.skip_ffn is False:
        return replace(budget, skipping_layers=0)
    if switches.skip_layers is None:
        return budget
    from llava_sv.model.config import SkipVisionConfig

    chosen = SkipVisionConfig(skip_layers=switches.skip_layers).layers_that_skip(llm.num_hidden_layers)
    return replace(budget, skipping_layers=len(chosen))


def _image_size(text: str) -> tuple[int, int]:
    """`"1024x768"` -> (1024, 768)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--image-size: cannot read {text!r}; write width x height in pixels, such as 1024x768")
    return int(match[1]), int(match[2])


def _check(question: Question) -> None:
    setting, budget = question.setting, question.budget
    counts = (
        ("--dense-tokens", setting.dense_tokens, 1),
        ("--num-retained", budget.retained, 1),
        ("--num-skipped", budget.skipped, 0),
        ("--text-tokens", question.text_tokens, 0),
        ("--supervised-tokens", question.supervised_tokens, 0),
        ("--new-tokens", question.new_tokens, 1),
        ("--batch", question.batch, 1),
    )
    check_budget(setting.dense_tokens, budget.retained, max(budget.skipped, 0))
    _check_counts(counts)
    if question.supervised_tokens > question.text_tokens:
        raise UserError(
            f"--supervised-tokens {question.supervised_tokens}: there are {question.text_tokens} text tokens; "
            "lower it, or raise --text-tokens"
        )


def _check_counts(counts: Iterable[tuple[str, int, int]]) -> None:
    """`UserError` for a flag's value below the least it may be. counts: (flag, value, least)."""
    wrong = [f"{name} {value}: at least {least}" for name, value, least in counts if value < least]
    if wrong:
        raise UserError(f"{', '.join(wrong)}; counts are whole numbers")


def _is_table(args: argparse.Namespace) -> bool:
    """Whether the paper's table is wanted: asked for, or nothing else is."""
    given = (args.family, args.preset, args.model_path, args.num_retained, args.num_skipped, args.dense_tokens)
    if not args.table:
        return all(value is None for value in (*given, args.image_size))
    if any(value is not None for value in (*given, args.image_size)):
        raise UserError("--table is of the paper's four settings: leave the family, the checkpoint and counts out")
    return True


def _report(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(the report, its text)."""
    if _is_table(args):
        other = (args.supervised_tokens, args.batch, args.dtype, args.stage, args.gradient_checkpointing)
        if args.memory or _switches(args).given or other != (None, 1, "bf16", "sft", False):
            raise UserError(
                "the paper's table takes --text-tokens and --new-tokens alone: other work, switches and --memory go "
                "with --family or --model-path"
            )
        _check_counts([("--text-tokens", args.text_tokens, 0), ("--new-tokens", args.new_tokens, 1)])
        report = paper_table(read_llm(args.llm_config), args.text_tokens, args.new_tokens)
        return report, render_table(report)
    question = _question(args)
    report = compare(question)
    if args.memory:
        from llava_sv.bench.footprint import footprint

        if args.image_size:
            raise UserError("--memory runs an image of most tokens: leave --image-size out")
        report["memory"] = footprint(question)
    return report, render(report)


def main(argv: list[str]) -> int:
    """`llava-sv flops ...`."""
    args = _parser().parse_args(argv)
    if args.list:
        print(render_presets())
        return 0
    keep_existing(args.json, args.overwrite)
    if args.json:
        check_can_write("--json", Path(args.json))
    report, text = _report(args)
    if args.json:
        write_json(args.json, report)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
