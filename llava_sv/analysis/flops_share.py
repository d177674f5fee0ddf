"""`llava-sv analyze flops-share` (the paper's Figure 2): what share of a prefill's FLOPs the FFN spends on visual
tokens, by their number; and what is left of it where they skip.

Arithmetic only, with `bench.exact`'s count of the language model and its head: no weights are read. Attention is split
by whose query it is: a visual token's share is its row of the T x T square.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llava_sv.analysis.common import Results, make_parser
from llava_sv.analysis.plots import COLOURS, figure
from llava_sv.bench.exact import Tokens, llm_flops, skipping_tokens
from llava_sv.bench.presets import FAMILIES, Budget, LlmSize, Setting, find_budget, read_llm
from llava_sv.errors import UserError

PARTS: dict[str, tuple[str, str]] = {
    "visual_ffn": ("visual tokens: FFN", COLOURS["visual"]),
    "visual_projections": ("visual tokens: projections", "#6baed6"),
    "visual_attention": ("visual tokens: attention", "#c6dbef"),
    "text_ffn": ("text tokens: FFN", "#7f7f7f"),
    "text_projections": ("text tokens: projections", "#a6a6a6"),
    "text_attention": ("text tokens: attention", "#cccccc"),
    "lm_head": ("output layer, one position", "#e8e8e8"),
}
"""Part -> (name in the figure, colour)."""

POINTS = 200


@dataclass(frozen=True)
class Mark:
    """A setting that is marked: a preset, or the checkpoint's own."""

    name: str
    dense: int
    """Visual tokens of one image without skipping."""
    budget: Budget | None
    """What skipping makes of them; None where nothing says."""


def parts_of(llm: LlmSize, tokens: Tokens, skipping_layers: int | None = None) -> dict[str, float]:
    """FLOPs of one prefill (one position through the output layer), by `PARTS`. Summaries count as visual."""
    whole = llm_flops(llm, tokens, 1, skipping_layers)
    text = llm_flops(llm, Tokens(tokens.text, 0), 1, skipping_layers)
    visual_rows = (tokens.sequence - tokens.text) / tokens.sequence
    return {
        "visual_ffn": whole["llm_ffn"] - text["llm_ffn"],
        "visual_projections": whole["llm_projections"] - text["llm_projections"],
        "visual_attention": whole["llm_attention"] * visual_rows,
        "text_ffn": text["llm_ffn"],
        "text_projections": text["llm_projections"],
        "text_attention": whole["llm_attention"] * (1 - visual_rows),
        "lm_head": whole["lm_head"],
    }


def shares(llm: LlmSize, counts: np.ndarray, text: int) -> np.ndarray:
    """[n, parts]: each part's share of a dense prefill with `counts` [n] visual and `text` text tokens."""
    rows = np.array([list(parts_of(llm, Tokens(text, int(count))).values()) for count in counts])
    return rows / rows.sum(axis=1, keepdims=True)


def of_mark(llm: LlmSize, mark: Mark, text: int) -> dict[str, Any]:
    """FLOPs of a setting, dense and skipping, by part, and `ratio`, skipping over dense."""
    dense = parts_of(llm, Tokens(text, mark.dense))
    made: dict[str, Any] = {"name": mark.name, "dense_tokens": mark.dense, "dense": dense, "skip": None, "ratio": None}
    made["visual_ffn_share_dense"] = dense["visual_ffn"] / sum(dense.values())
    if mark.budget is not None:
        skip = parts_of(llm, skipping_tokens(text, mark.budget), mark.budget.skipping_layers)
        made |= {"retained": mark.budget.retained, "skipped": mark.budget.skipped, "summaries": mark.budget.summaries}
        made |= {"skip": skip, "ratio": sum(skip.values()) / sum(dense.values())}
        made["visual_ffn_share_skip"] = skip["visual_ffn"] / sum(skip.values())
    return made


def marks_of_presets() -> list[Mark]:
    """Every family's presets."""

    def budget(setting: Setting) -> Budget | None:
        return None if setting.num_retained is None else find_budget(setting, None, None)

    return [
        Mark(f"{family} {name}", setting.dense_tokens, budget(setting))
        for family, presets in FAMILIES.items()
        for name, setting in presets.items()
    ]


def read_model(model_path: str) -> tuple[LlmSize, list[Mark]]:
    """Sizes of a checkpoint's language model, and its own setting. Raises `UserError` for a folder without a LLaVA."""
    from llava_sv.bench.checkpoint import budget_of, llm_of, read_checkpoint, setting_of

    config = read_checkpoint(model_path, may_be_dense=True)
    budget = budget_of(config) if config.skip_vision else None
    return llm_of(config), [Mark("this checkpoint", setting_of(config).dense_tokens, budget)]


def draw(llm: LlmSize, counts: np.ndarray, text: list[int], marks: list[dict[str, Any]], name: str) -> Any:
    """Left: Figure 2, a line per number of text tokens. Middle: all parts. Right: settings, dense and skipping."""
    from matplotlib.ticker import PercentFormatter

    made, axes = figure(columns=3, width=14.5, height=4.8, gridspec_kw={"width_ratios": [1, 1, 1.25]})
    share, parts, bars = axes[0]
    for number, shade in zip(text, np.linspace(1.0, 0.35, len(text))):
        values = shares(llm, counts, number)[:, 0]
        share.plot(counts, values, color=COLOURS["visual"], alpha=shade, label=f"{number} text tokens")
    for count in sorted({mark["dense_tokens"] for mark in marks if mark["dense_tokens"] <= counts[-1]}):
        y = shares(llm, np.array([count]), text[0])[0, 0]
        share.plot(count, y, "o", color=COLOURS["bound"], markersize=4)
        share.annotate(str(count), (count, y), xytext=(4, -11), textcoords="offset points", fontsize=7)
    share.set_title("visual tokens' FFN, share of all FLOPs\n(dots: settings without skipping)", fontsize=10)
    share.legend(frameon=False, fontsize=8, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.5)
    parts.stackplot(counts, shares(llm, counts, text[0]).T, colors=[colour for _, colour in PARTS.values()])
    parts.set_title(f"all parts, {text[0]} text tokens", fontsize=10)
    for axis in (share, parts):
        axis.set_xlabel("visual tokens")
        axis.set_xlim(counts[0], counts[-1])
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _draw_bars(bars, marks)
    bars.xaxis.set_major_formatter(PercentFormatter(1.0))
    bars.set_title(f"settings, {text[0]} text tokens, against each one dense", fontsize=10)
    handles, labels = zip(*[(parts.collections[i], label) for i, (label, _) in enumerate(PARTS.values())])
    made.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    made.suptitle(f"FLOPs of a prefill: {name}", fontsize=11)
    return made


def _draw_bars(axis: Any, marks: list[dict[str, Any]]) -> None:
    """A pair of bars a setting: dense, and what skipping leaves; each in the dense one's total."""
    rows, labels = [], []
    for mark in marks:
        if mark["skip"] is None and any(other["skip"] for other in marks):
            continue  # a setting without a budget has nothing to be compared
        total = sum(mark["dense"].values())
        rows.append((mark["dense"], total))
        labels.append(f"{mark['name']}: {mark['dense_tokens']}")
        if mark["skip"] is not None:
            rows.append((mark["skip"], total))
            labels.append(f"{mark['retained']} + {mark['skipped']} skip")
    places = np.arange(len(rows))[::-1]
    left = np.zeros(len(rows))
    for part, (_, colour) in PARTS.items():
        widths = np.array([parts[part] / total for parts, total in rows])
        axis.barh(places, widths, left=left, color=colour, height=0.75)
        left += widths
    for place, end in zip(places, left):
        axis.text(end + 0.01, place, f"{end:.0%}", va="center", fontsize=8)
    axis.set_yticks(places, labels, fontsize=8)
    axis.set_xlim(0, 1.1)
    axis.set_ylim(min(-0.6, len(rows) - 6.5), max(len(rows) - 0.4, 2.5))


def _counts(text: str, flag: str) -> list[int]:
    """`"200,50"` -> [200, 50]; whole numbers of at least 1, or `UserError`."""
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise UserError(f"{flag}: cannot read {text!r}; write whole numbers of 1 or more, such as 200 or 200,50")
    return list(dict.fromkeys(map(int, found)))


def main(argv: list[str]) -> int:
    """`llava-sv analyze flops-share ...`."""
    parser = make_parser(
        "flops-share",
        "The FFN's share of FLOPs on visual tokens, by their number (Figure 2); no weights are read.",
        "llava-sv analyze flops-share --llm-config llama-3-8b",
        with_model=False,
    )
    parser.add_argument("--llm-config", help="language model: a name or sizes, as in llava-sv flops (llama-3-8b)")
    parser.add_argument("--model-path", help="take sizes and the setting from a checkpoint's config.json instead")
    parser.add_argument("--text-tokens", default="200,50,1000", help="text tokens beside them; several: lines of the "
                        "left panel, the first is also the others' (default 200,50,1000)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, help="visual tokens up to which curves go (default: by the settings)")
    args = parser.parse_args(argv)
    text = _counts(args.text_tokens, "--text-tokens")
    if args.model_path and args.llm_config:
        raise UserError("--llm-config and --model-path: give one of them; a checkpoint has sizes of its own")
    if args.max_tokens is not None and args.max_tokens < 2:
        raise UserError(f"--max-tokens {args.max_tokens}: must be 2 or more")
    name = args.model_path or args.llm_config or "llama-3-8b"
    llm, chosen = read_model(args.model_path) if args.model_path else (read_llm(name), marks_of_presets())
    results = Results(args.output, "flops-share", args.overwrite)
    last = args.max_tokens or round(1.1 * max(mark.dense for mark in chosen))
    counts = np.unique(np.linspace(1, last, POINTS).round().astype(int))
    marks = [of_mark(llm, mark, text[0]) for mark in chosen]
    table = np.array([shares(llm, counts, number) for number in text])
    arrays = {"visual_tokens": counts, "text_tokens": np.array(text), "parts": np.array(list(PARTS)), "shares": table}
    numbers = {"llm": asdict(llm), "source": name, "text_tokens": text, "settings": marks}
    results.save(arrays, numbers, lambda: draw(llm, counts, text, marks, name))
    print(render(marks, text[0]))
    return 0


def render(marks: list[dict[str, Any]], text: int) -> str:
    """A line a setting for a terminal."""
    lines = [f"{text} text tokens; share of a prefill's FLOPs (language model and its head)"]
    heads = ("visual FFN", "skipping", "visual FFN")
    lines.append(
        f"{'setting':<20}{'dense tokens':>13}" + "".join(f"{head:>12}" for head in heads) + f"{'of dense':>10}"
    )
    for mark in marks:
        line = f"{mark['name']:<20}{mark['dense_tokens']:>13}{mark['visual_ffn_share_dense']:>12.1%}"
        if mark["skip"] is not None:
            kept = f"{mark['retained']}/{mark['skipped']}"
            line += f"{kept:>12}{mark['visual_ffn_share_skip']:>12.1%}{mark['ratio']:>10.1%}"
        lines.append(line)
    return "\n".join(lines)
