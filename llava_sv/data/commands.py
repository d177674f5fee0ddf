"""`llava-sv data index | stats`: look at a data file before training on it. Called by `llava_sv.cli`.

A command line arrives, an exit code leaves. `UserError` travels to the caller.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_sv.data.index import Records, open_index
from llava_sv.errors import UserError
from llava_sv.files import write_json


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


# -- index ------------------------------------------------------------------------------------------------------------


def index_main(argv: list[str]) -> int:
    """Make the index of a file (or find it made), so that training starts at once."""
    parser = _parser(
        "index",
        "Check a data file and lay it out for memory-mapped reading; training does so by itself on first use.",
        "playground/data/toy/sft.json",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="where to keep it [datasets' cache, where training looks]")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    records = open_index(args.data, args.cache_dir)
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


# -- stats ------------------------------------------------------------------------------------------------------------


def stats_main(argv: list[str]) -> int:
    """Count what a file holds."""
    parser = _parser(
        "stats",
        "Count records, images, turns and lengths of a data file.",
        "playground/data/toy/sft.json --tokenizer playground/tiny/llm --template llama_3",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="where to keep it [datasets' cache, where training looks]")
    parser.add_argument("--tokenizer", metavar="PATH", help="count tokens with this tokenizer too")
    parser.add_argument("--template", help="conversation template to count tokens in (with --tokenizer)")
    args = parser.parse_args(argv)
    if (args.tokenizer is None) != (args.template is None):
        raise UserError("--tokenizer and --template go together: tokens are counted of a rendered conversation")
    records = open_index(args.data, args.cache_dir)
    report = _stats(records)
    if args.tokenizer is not None:
        report |= _token_stats(records, args.tokenizer, args.template)
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:<{width}}  {_shown(value)}")
    if args.json:
        write_json(args.json, {"file": args.data, **report})
    return 0


def _stats(records: Records) -> dict[str, Any]:
    images = records.num_images
    return {
        "records": len(records),
        "with_image": int((images > 0).sum()),
        "text_only": int((images == 0).sum()),
        "several_images": int((images > 1).sum()),
        "images": int(images.sum()),
        "exchanges": int(records.num_turns.sum()) // 2,
        "exchanges_per_record": _quantiles(records.num_turns // 2),
        "characters_per_record": _quantiles(records.num_chars),
    }


def _token_stats(records: Records, tokenizer_path: str, template_name: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
    from llava_sv.conversation import get_template
    from llava_sv.data.preprocess import check_tokenizer, preprocess

    template = get_template(template_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, use_fast=True)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {tokenizer_path}: cannot be loaded ({str(error).splitlines()[0]})") from error
    check_tokenizer(tokenizer, template)
    text, supervised = [], []
    for record in tqdm(records, total=len(records), desc="counting tokens", unit="record"):
        sample = preprocess(record, tokenizer, template)
        text.append(int((sample["input_ids"] != IMAGE_TOKEN_INDEX).sum()))
        supervised.append(int((sample["labels"] != IGNORE_INDEX).sum()))
    return {
        "text_tokens": sum(text),
        "text_tokens_per_record": _quantiles(np.array(text)),
        "supervised_tokens": sum(supervised),
        "supervised_tokens_per_record": _quantiles(np.array(supervised)),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    low, half, high, most = np.quantile(values, [0, 0.5, 0.95, 1]).tolist()
    return {"mean": float(values.mean()), "least": low, "median": half, "95%": high, "most": most}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.4g}" for name, number in value.items())
    return f"{value:,}"
