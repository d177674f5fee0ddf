"""The paper's section 6.2 and Table 1, figure by figure, beside the exact count: `llava-sv flops --table`.

A language model's sizes arrive; a report of plain numbers leaves.
"""

from __future__ import annotations

from typing import Any

from llava_sv.bench.counts import Question, compare, paper_ratio
from llava_sv.bench.parameters import table_1
from llava_sv.bench.presets import FAMILIES, LlmSize, find_budget

SETTINGS: tuple[tuple[str, str, str, int], ...] = (
    ("LLaVA 100 + 156 of 576", "llava", "100_156", 25),
    ("LLaVA 256 + 320 of 576", "llava", "256_320", 60),
    ("LLaVA-HD 576 + 576 of 2880", "llava_hd", "2x2", 50),
    ("CoS 272 + 256 of 1296", "cos", "cos_1296", 25),
)
"""Label, family, preset, and the percentage of FLOPs that the paper's Table 2 prints."""

PRINTED = {
    "ffn": "10.5LNC^2, 5.64B (70%)",
    "attention": "2LN^2C + 1.5NC^2, 1.34B (17%)",
    "embedding": "0.5B (6%)",
}
"""The paper's Table 1."""

KEYS = ("exact_llm_ratio", "exact_ratio", "train_llm_ratio", "train_ratio", "decode_ratio", "end_to_end_ratio")


def hd_baseline(percent: int = 50) -> int:
    """Dense tokens of LLaVA-HD from which the paper's formula gives the percentage that it prints."""
    return next(tokens for tokens in range(1152, 2881) if paper_ratio(576, 576, tokens) <= percent / 100)


def paper_table(llm: LlmSize, text_tokens: int, new_tokens: int) -> dict[str, Any]:
    """`settings`: a row each; `table_1`: part -> figures."""
    rows = []
    for label, family, preset, printed in SETTINGS:
        setting = FAMILIES[family][preset]
        budget = find_budget(setting, None, None)
        question = Question(family, preset, setting, llm, budget, text_tokens, text_tokens, new_tokens)
        report = compare(question)
        counts = {"num_retained": budget.retained, "num_skipped": budget.skipped, "dense_tokens": setting.dense_tokens}
        ratios = {key: report[key] for key in ("paper_ratio", *KEYS, "kv_ratio")}
        totals = {
            side: {stage: report[side][stage]["total"] for stage in ("prefill", "train")} for side in ("dense", "skip")
        }
        kv = {side: report[side]["answer"][report[side]["kv_level"]]["kv_bytes"] for side in ("dense", "skip")}
        rows.append({"label": label, "family": family, "preset": preset, **counts, "printed": printed, **ratios})
        rows[-1] |= {"flops": totals, "kv_bytes": kv}
    tokens = FAMILIES["llava"]["100_156"].dense_tokens
    shares = {part: {**row, "printed": PRINTED[part]} for part, row in table_1(llm, tokens).items()}
    return {
        "settings": rows,
        "hd_baseline": hd_baseline(),
        "table_1": shares,
        "table_1_tokens": tokens,
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
    }
