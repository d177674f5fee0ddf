"""`llava-sv flops`: how much work a setting saves, as the paper counts it and exactly. Plain arithmetic; torch is
imported for a checkpoint only.

Sizes and token counts arrive; ratios (skipping over dense) and every term leave. Also called by the report and tests.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from llava_sv.bench.exact import (
    Tokens,
    compression_flops,
    encoder_flops,
    llm_flops,
    mlp_projector_flops,
    resampler_flops,
    train_factors,
    with_total,
)
from llava_sv.bench.presets import (
    FAMILIES,
    LLMS,
    Budget,
    LlmSize,
    Setting,
    check_budget,
    find_budget,
    find_setting,
    read_llm,
)
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import write_json

EXAMPLE = """example:
  llava-sv flops --family llava --num-retained 100 --num-skipped 156 --text-tokens 200 --json flops.json
  llava-sv flops --model-path checkpoints/llava-skip
  llava-sv flops --model-path checkpoints/llava-hd-skip --image-size 1024x768"""


def paper_flops(n1: int, n2: int, hidden: int, ffn: int) -> int:
    """Section 6.2's formula, a layer: `4 N1 C^2 + 2 N1^2 C + 3 N2 C M`; N1 tokens in attention, N2 in the FFN.

    Visual tokens only; it counts a multiply-add once, and knows no grouped-query attention.
    """
    return 4 * n1 * hidden**2 + 2 * n1**2 * hidden + 3 * n2 * hidden * ffn


def paper_ratio(retained: int, skipped: int, dense: int, hidden: int = 4096, ffn: int = 14336) -> float:
    """Skipping over dense by the paper's formula: `retained` tokens pass the FFN, `skipped` only attend."""
    return paper_flops(retained + skipped, retained, hidden, ffn) / paper_flops(dense, dense, hidden, ffn)


def exact_flops(
    llm: LlmSize, setting: Setting, tokens: Tokens, head_tokens: int, skipping: int | None = None
) -> dict[str, float]:
    """Every part of one sample's forward, in FLOPs, with the sums `llm` and `total`; `exact` says what is counted."""
    encoder = setting.encoder
    if setting.windows:
        projector = resampler_flops(encoder, setting.windows, setting.levels, llm.hidden_size)
    else:
        rows = setting.views * (encoder.patches + int(setting.projects_cls))
        projector = mlp_projector_flops(rows, encoder.hidden_size, llm.hidden_size, setting.projector_depth)
    return with_total(
        {
            **encoder_flops(encoder, setting.views),
            **projector,
            **compression_flops(tokens, llm.hidden_size),
            **llm_flops(llm, tokens, head_tokens, skipping),
        }
    )


def train_flops(forward: dict[str, float], **stage: bool) -> dict[str, float]:
    """A training step's FLOPs from its forward's parts; `stage` as in `train_factors`."""
    factors = train_factors(**stage)
    return with_total({name: value * factors[name] for name, value in forward.items() if name in factors})


@dataclass(frozen=True)
class Question:
    """What the command line asks."""

    family: str
    preset: str | None
    setting: Setting
    llm: LlmSize
    budget: Budget
    text_tokens: int
    supervised_tokens: int

    @property
    def tokens(self) -> dict[str, Tokens]:
        """The sequence of one sample, dense and skipping."""
        budget = self.budget
        last = int(budget.last_visual_ffn)  # the last skipped token passes the FFN as a retained one does
        retained, skipped = budget.retained + last, budget.skipped - last
        skip = Tokens(self.text_tokens, retained, skipped, budget.summaries, budget.merged_from, budget.pooled)
        return {"dense": Tokens(self.text_tokens, self.setting.dense_tokens), "skip": skip}

    def forward(self, name: str, head_tokens: int) -> dict[str, float]:
        """`exact_flops` of the side `name`, `dense` or `skip`."""
        layers = self.budget.skipping_layers
        return exact_flops(self.llm, self.setting, self.tokens[name], head_tokens, layers)

    def training(self, name: str) -> dict[str, float]:
        """FLOPs of a training step; CoS trains its encoder, the others do not."""
        return train_flops(self.forward(name, self.supervised_tokens), train_encoder=self.family == "cos")


def compare(question: Question) -> dict[str, Any]:
    """The JSON report: `paper_ratio`, `exact_ratio` (prefill), `train_ratio`, and every term under `dense`, `skip`."""
    llm, setting, budget = question.llm, question.setting, question.budget
    sides: dict[str, dict[str, Any]] = {}
    for name, tokens in question.tokens.items():
        attending = tokens.retained + tokens.skipped
        layers = llm.num_hidden_layers
        skip_layers = layers if budget.skipping_layers is None else budget.skipping_layers
        skip_layer = paper_flops(attending, tokens.retained, llm.hidden_size, llm.intermediate_size)
        full_layer = paper_flops(attending, attending, llm.hidden_size, llm.intermediate_size)
        sides[name] = {
            "visual_tokens": attending + tokens.summaries,
            "sequence": tokens.sequence,
            "ffn_rows": tokens.ffn_rows,
            "paper_multiply_adds": skip_layers * skip_layer + (layers - skip_layers) * full_layer,
            "prefill": question.forward(name, head_tokens=1),
            "train": question.training(name),
        }

    def ratio(stage: str, part: str) -> float:
        return sides["skip"][stage][part] / sides["dense"][stage][part]

    return {
        "family": question.family,
        "preset": question.preset,
        "num_retained": budget.retained,
        "num_skipped": budget.skipped,
        "retained_bounds": budget.retained_bounds and list(budget.retained_bounds),
        "views": setting.views,
        "dense_tokens": setting.dense_tokens,
        "text_tokens": question.text_tokens,
        "supervised_tokens": question.supervised_tokens,
        "paper_ratio": paper_ratio(
            budget.retained, budget.skipped, setting.dense_tokens, llm.hidden_size, llm.intermediate_size
        ),
        "exact_ratio": ratio("prefill", "total"),
        "exact_llm_ratio": ratio("prefill", "llm"),
        "train_ratio": ratio("train", "total"),
        "train_llm_ratio": ratio("train", "llm"),
        "dense": sides["dense"],
        "skip": sides["skip"],
        "llm": asdict(llm),
        "encoder": asdict(setting.encoder),
    }


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    name = " ".join(filter(None, (report["family"], report["preset"])))
    lines = [
        f"{name}: {report['dense_tokens']} dense tokens against "
        f"{report['num_retained']} retained + {report['num_skipped']} skipped, {report['text_tokens']} text tokens",
        f"  the paper's formula (visual tokens, one layer)  {report['paper_ratio']:7.1%}",
        f"  exact, prefill: language model                  {report['exact_llm_ratio']:7.1%}",
        f"  exact, prefill: with encoder and projector      {report['exact_ratio']:7.1%}",
        f"  exact, training step: language model            {report['train_llm_ratio']:7.1%}",
        f"  exact, training step: all                       {report['train_ratio']:7.1%}",
        "",
        f"  {'prefill, GFLOPs':<20}{'dense':>12}{'skip':>12}",
    ]
    if report["retained_bounds"]:
        least, most = report["retained_bounds"]
        lines.insert(1, f"  num_retained auto: counted at the average budget; an image retains {least} to {most}")
    for name, dense in report["dense"]["prefill"].items():
        lines.append(f"  {name:<20}{dense / 1e9:>12,.2f}{report['skip']['prefill'][name] / 1e9:>12,.2f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-sv flops",
        description="Count the FLOPs of one sample, skipping over dense: by the paper's formula, and exactly.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", help=f"{', '.join(FAMILIES)} (default: the checkpoint's)")
    parser.add_argument("--preset", help="a setting of the family: its encoder, projector and token counts")
    parser.add_argument("--num-retained", type=int, help="Nr: visual tokens that pass the FFN (default: the preset's)")
    parser.add_argument("--num-skipped", type=int, help="Ns: visual tokens that skip it (default: the preset's)")
    parser.add_argument("--dense-tokens", type=int, help="visual tokens without skipping (default: the preset's)")
    parser.add_argument("--text-tokens", type=int, default=200, help="text tokens beside the image (default 200)")
    parser.add_argument("--supervised-tokens", type=int, help="training: those that carry loss (default: all text)")
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
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    return parser


def _question(args: argparse.Namespace) -> Question:
    """The arguments, defaults filled in and checked."""
    question = _of_checkpoint(args) if args.model_path else _of_preset(args)
    if args.dense_tokens is not None:
        question = replace(question, setting=replace(question.setting, dense_tokens=args.dense_tokens))
    _check(question)
    return question


def _of_checkpoint(args: argparse.Namespace) -> Question:
    """Everything from a checkpoint's own config."""
    if args.preset:
        raise UserError("--preset does not go with --model-path: the checkpoint says what its images take")
    size = _image_size(args.image_size) if args.image_size else None
    from llava_sv.bench.checkpoint import budget_of, llm_of, read_checkpoint, setting_of

    config = read_checkpoint(args.model_path, args.num_retained, args.num_skipped)
    if args.family not in (None, config.mm_family):
        raise UserError(f"--family {args.family}: {args.model_path} is of family {config.mm_family}; leave it out")
    setting, budget = setting_of(config, size), budget_of(config, size)
    return Question(config.mm_family, None, setting, llm_of(config), budget, args.text_tokens, _supervised(args))


def _of_preset(args: argparse.Namespace) -> Question:
    """A preset of `FAMILIES`, with both summaries, merging where it makes fewer tokens."""
    if not args.family:
        raise UserError(f"--family is missing; known: {', '.join(FAMILIES)}; or give --model-path")
    name, setting = find_setting(args.family, args.preset)
    if args.image_size:
        raise UserError("--image-size goes with --model-path: a preset is for one size; say --dense-tokens")
    setting = replace(setting, dense_tokens=args.dense_tokens or setting.dense_tokens)
    budget = find_budget(setting, args.num_retained, args.num_skipped)
    return Question(args.family, name, setting, read_llm(args.llm_config), budget, args.text_tokens, _supervised(args))


def _supervised(args: argparse.Namespace) -> int:
    return args.text_tokens if args.supervised_tokens is None else args.supervised_tokens


def _image_size(text: str) -> tuple[int, int]:
    """`"1024x768"` -> (1024, 768)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--image-size: cannot read {text!r}; write width x height in pixels, such as 1024x768")
    return int(match[1]), int(match[2])


def _check(question: Question) -> None:
    setting, budget = question.setting, question.budget
    wrong = [
        name
        for name, value, least in (
            ("--dense-tokens", setting.dense_tokens, 1),
            ("--num-retained", budget.retained, 1),
            ("--num-skipped", budget.skipped, 0),
            ("--text-tokens", question.text_tokens, 0),
            ("--supervised-tokens", question.supervised_tokens, 0),
        )
        if value < least
    ]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: too small; token counts are whole numbers, --num-retained at least 1")
    check_budget(setting.dense_tokens, budget.retained, budget.skipped)


def main(argv: list[str]) -> int:
    """`llava-sv flops ...`."""
    args = _parser().parse_args(argv)
    report = compare(_question(args))
    print(render(report))
    if args.json:
        write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
