"""`llava-sv flops`: how much work a setting saves, as the paper counts it and exactly. Plain arithmetic, no torch.

Sizes and token counts arrive; ratios (skipping over dense) and every term leave. Also called by the report and tests.
"""

from __future__ import annotations

import argparse
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
    EncoderSize,
    LlmSize,
    Setting,
    encoder_of,
    find_setting,
    llm_of,
    projector_depth_of,
    read_llm,
    read_model_config,
)
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import write_json

EXAMPLE = """example:
  llava-sv flops --family llava --num-retained 100 --num-skipped 156 --text-tokens 200 --json flops.json
  llava-sv flops --model-path checkpoints/llava-skip"""


def paper_flops(n1: int, n2: int, hidden: int, ffn: int) -> int:
    """Section 6.2's formula, a layer: `4 N1 C^2 + 2 N1^2 C + 3 N2 C M`; N1 tokens in attention, N2 in the FFN.

    Visual tokens only; it counts a multiply-add once, and knows no grouped-query attention.
    """
    return 4 * n1 * hidden**2 + 2 * n1**2 * hidden + 3 * n2 * hidden * ffn


def paper_ratio(retained: int, skipped: int, dense: int, hidden: int = 4096, ffn: int = 14336) -> float:
    """Skipping over dense by the paper's formula: `retained` tokens pass the FFN, `skipped` only attend."""
    return paper_flops(retained + skipped, retained, hidden, ffn) / paper_flops(dense, dense, hidden, ffn)


def exact_flops(
    llm: LlmSize, encoder: EncoderSize, setting: Setting, tokens: Tokens, head_tokens: int, skipping: int | None = None
) -> dict[str, float]:
    """Every part of one sample's forward, in FLOPs, with the sums `llm` and `total`; `exact` says what is counted."""
    if setting.windows:
        projector = resampler_flops(encoder, setting.windows, llm.hidden_size)
    else:
        projector = mlp_projector_flops(
            setting.views * encoder.patches, encoder.hidden_size, llm.hidden_size, setting.projector_depth
        )
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
    retained: int
    skipped: int
    summaries: int
    merge: bool
    text_tokens: int
    supervised_tokens: int
    skipping_layers: int | None = None
    """Decoder layers that skip; None: all of them."""
    last_visual_ffn: bool = False

    @property
    def tokens(self) -> dict[str, Tokens]:
        """The sequence of one sample, dense and skipping."""
        rest = self.setting.dense_tokens - self.retained
        merged = rest if self.merge and self.skipped < rest else 0
        last = int(self.last_visual_ffn)  # the last skipped token passes the FFN as a retained one does
        return {
            "dense": Tokens(self.text_tokens, self.setting.dense_tokens),
            "skip": Tokens(self.text_tokens, self.retained + last, self.skipped - last, self.summaries, merged),
        }


def compare(question: Question) -> dict[str, Any]:
    """The JSON report: `paper_ratio`, `exact_ratio` (prefill), `train_ratio`, and every term under `dense`, `skip`."""
    llm, setting = question.llm, question.setting
    sides: dict[str, dict[str, Any]] = {}
    for name, tokens in question.tokens.items():
        skipping = question.skipping_layers
        parts = exact_flops(llm, setting.encoder, setting, tokens, head_tokens=1, skipping=skipping)
        step = exact_flops(llm, setting.encoder, setting, tokens, question.supervised_tokens, skipping=skipping)
        attending = tokens.retained + tokens.skipped
        layers = llm.num_hidden_layers
        skip_layers = layers if skipping is None else skipping
        skip_layer = paper_flops(attending, tokens.retained, llm.hidden_size, llm.intermediate_size)
        full_layer = paper_flops(attending, attending, llm.hidden_size, llm.intermediate_size)
        sides[name] = {
            "visual_tokens": attending + tokens.summaries,
            "sequence": tokens.sequence,
            "ffn_rows": tokens.ffn_rows,
            "paper_multiply_adds": skip_layers * skip_layer + (layers - skip_layers) * full_layer,
            "prefill": parts,
            "train": train_flops(step, train_encoder=question.family == "cos"),
        }

    def ratio(stage: str, part: str) -> float:
        return sides["skip"][stage][part] / sides["dense"][stage][part]

    return {
        "family": question.family,
        "preset": question.preset,
        "num_retained": question.retained,
        "num_skipped": question.skipped,
        "dense_tokens": setting.dense_tokens,
        "text_tokens": question.text_tokens,
        "supervised_tokens": question.supervised_tokens,
        "paper_ratio": paper_ratio(
            question.retained, question.skipped, setting.dense_tokens, llm.hidden_size, llm.intermediate_size
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
    lines = [
        f"{report['family']} {report['preset'] or ''}: {report['dense_tokens']} dense tokens against "
        f"{report['num_retained']} retained + {report['num_skipped']} skipped, {report['text_tokens']} text tokens",
        f"  the paper's formula (visual tokens, one layer)  {report['paper_ratio']:7.1%}",
        f"  exact, prefill: language model                  {report['exact_llm_ratio']:7.1%}",
        f"  exact, prefill: with encoder and projector      {report['exact_ratio']:7.1%}",
        f"  exact, training step: language model            {report['train_llm_ratio']:7.1%}",
        f"  exact, training step: all                       {report['train_ratio']:7.1%}",
        "",
        f"  {'prefill, GFLOPs':<20}{'dense':>12}{'skip':>12}",
    ]
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
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    return parser


def _question(args: argparse.Namespace) -> Question:
    """The arguments, defaults filled in and checked."""
    block: dict[str, Any] = {}
    skipping: int | None = None
    if args.model_path:
        config = read_model_config(args.model_path)
        family = args.family or config.get("mm_family", "llava")
        _, preset = find_setting(family, args.preset)
        encoder = encoder_of(config)
        block = config.get("skip_vision") or {}
        skipping = _skipping_layers(block, config)
        dense = preset.dense_tokens if preset.windows else preset.views * encoder.patches
        retained, skipped = block.get("num_retained"), block.get("num_skipped")
        if retained is not None and not block.get("merge", True):
            skipped = dense - retained
        setting = Setting(encoder, preset.views, dense, retained, skipped, preset.windows, projector_depth_of(config))
        name, llm = args.preset, llm_of(config)
    else:
        if not args.family:
            raise UserError(f"--family is missing; known: {', '.join(FAMILIES)}; or give --model-path")
        family = args.family
        name, setting = find_setting(family, args.preset)
        llm = read_llm(args.llm_config)
    if args.dense_tokens is not None:
        setting = replace(setting, dense_tokens=args.dense_tokens)
    retained = setting.num_retained if args.num_retained is None else args.num_retained
    skipped = setting.num_skipped if args.num_skipped is None else args.num_skipped
    if retained is None or skipped is None:
        raise UserError("--num-retained and --num-skipped are needed here: neither preset nor checkpoint gives them")
    _check(setting, retained, skipped, args.text_tokens, args.supervised_tokens)
    return Question(
        family,
        name,
        setting,
        llm,
        retained,
        skipped,
        summaries=int(block.get("former_summary", True)) + int(block.get("latter_summary", True)),
        merge=block.get("merge", True),
        text_tokens=args.text_tokens,
        supervised_tokens=args.text_tokens if args.supervised_tokens is None else args.supervised_tokens,
        skipping_layers=skipping,
        last_visual_ffn=block.get("last_visual_ffn", False),
    )


def _skipping_layers(block: dict[str, Any], config: dict[str, Any]) -> int | None:
    """How many of a checkpoint's decoder layers skip, as its `skip_ffn` and `skip_layers` say."""
    if not block:
        return None
    from llava_sv.model.config import SkipVisionConfig

    return len(SkipVisionConfig.from_dict(block).layers_that_skip(config["num_hidden_layers"]))


def _check(setting: Setting, retained: int, skipped: int, text: int, supervised: int | None) -> None:
    wrong = [
        name
        for name, value, least in (
            ("--dense-tokens", setting.dense_tokens, 1),
            ("--num-retained", retained, 1),
            ("--num-skipped", skipped, 0),
            ("--text-tokens", text, 0),
            ("--supervised-tokens", supervised or 0, 0),
        )
        if value < least
    ]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: too small; token counts are whole numbers, --num-retained at least 1")
    if retained + skipped > setting.dense_tokens:
        raise UserError(
            f"--num-retained {retained} + --num-skipped {skipped} is more than the {setting.dense_tokens} dense "
            "tokens; lower one of them, or raise --dense-tokens"
        )


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
