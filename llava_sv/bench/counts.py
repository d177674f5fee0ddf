"""One question to `llava-sv flops`, and its answer: ratios (skipping over dense), FLOPs by part, KV bytes, weights.

Called by `flops` (the command) and `paper_table`; plain arithmetic. Sizes and token counts arrive, a report of plain
numbers leaves. What is counted, `exact` says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llava_sv.bench.answer import BYTES, answer, kv_bytes_per_token, levels_of
from llava_sv.bench.exact import (
    Tokens,
    llm_flops,
    recomputed_flops,
    skipping_tokens,
    train_factors,
    vision_flops,
    with_total,
)
from llava_sv.bench.parameters import parameters
from llava_sv.bench.presets import Budget, LlmSize, Setting

SIDES = ("dense", "skip")
SUMS = ("llm", "total")


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
    before = vision_flops(setting, tokens, llm.hidden_size)
    return with_total({**before, **llm_flops(llm, tokens, head_tokens, skipping)})


def train_flops(forward: dict[str, float], **stage: bool) -> dict[str, float]:
    """A training step's FLOPs from its forward's parts; `stage` as in `train_factors`."""
    factors = train_factors(**stage)
    return with_total({name: value * factors[name] for name, value in forward.items() if name in factors})


@dataclass(frozen=True)
class Question:
    """What is asked: one sample with one image of a setting, on a language model.

    `trains`: `sft` (the language model, and CoS' encoder) or `pretrain` (the projector alone). `recompute`: activation
    checkpointing. `dtype`: of weights and cache.
    """

    family: str
    preset: str | None
    setting: Setting
    llm: LlmSize
    budget: Budget
    text_tokens: int
    supervised_tokens: int
    new_tokens: int = 64
    batch: int = 1
    dtype: str = "bfloat16"
    trains: str = "sft"
    recompute: bool = False
    parameters: dict[str, int] | None = None
    """Part -> parameters; None: by arithmetic."""
    config: Any = None
    """A checkpoint's own config, where it is one's that is asked about."""

    @property
    def tokens(self) -> dict[str, Tokens]:
        """The sequence of one sample, dense and skipping."""
        dense = Tokens(self.text_tokens, self.setting.dense_tokens)
        return {"dense": dense, "skip": skipping_tokens(self.text_tokens, self.budget)}

    @property
    def skipping_layers(self) -> int:
        """Decoder layers that skip."""
        layers = self.budget.skipping_layers
        return self.llm.num_hidden_layers if layers is None else layers

    def forward(self, name: str, head_tokens: int) -> dict[str, float]:
        """`exact_flops` of the side `name`, `dense` or `skip`."""
        return exact_flops(self.llm, self.setting, self.tokens[name], head_tokens, self.skipping_layers)

    def training(self, name: str) -> dict[str, float]:
        """FLOPs of a training step. In SFT, CoS trains its encoder, the others do not."""
        sft = self.trains == "sft"
        trains_encoder = sft and self.family == "cos"
        forward = self.forward(name, self.supervised_tokens)
        step = train_flops(forward, train_llm=sft, train_encoder=trains_encoder)
        if not self.recompute:
            return step
        again = recomputed_flops(forward, self.setting.encoder, self._share_of_full_layers(name), trains_encoder)
        return with_total({part: value + again.get(part, 0) for part, value in step.items() if part not in SUMS})

    def _share_of_full_layers(self, name: str) -> float:
        """Of the FFN's work: that of layers which do not skip."""
        if name == "dense":
            return 1.0
        tokens, skipping = self.tokens[name], self.skipping_layers
        full = (self.llm.num_hidden_layers - skipping) * tokens.sequence
        return full / (full + skipping * tokens.ffn_rows)

    def answers(self, name: str) -> dict[str, dict[str, Any]]:
        """`answer` at each level of the skip KV-cache that says something of this side."""
        tokens, prefill = self.tokens[name], self.forward(name, head_tokens=1)["total"]
        rest = (self.new_tokens, self.dtype, self.batch)
        return {level: answer(self.llm, tokens, prefill, level, *rest) for level in levels_of(tokens)}

    def level(self, name: str) -> str:
        """The KV level in use: the budget's, as far as this side has anything to remove."""
        levels, asked = levels_of(self.tokens[name]), self.budget.skip_kv
        return asked if asked in levels else "skipped" if asked != "none" and "skipped" in levels else "none"

    @property
    def shared(self) -> float:
        """FLOPs that a batch's further samples do not take: CoS' learned queries are projected once, at level one."""
        queries = sum(count for _, count in self.setting.windows)
        return 2 * queries * self.setting.encoder.hidden_size**2

    def of_batch(self, one: float, passes: float = 1) -> float:
        """FLOPs of the batch, from those of one sample; passes: forwards' worth of work on each weight."""
        return self.batch * one - (self.batch - 1) * passes * self.shared


def side_of(question: Question, name: str) -> dict[str, Any]:
    """The report of one side, `dense` or `skip`."""
    llm, tokens, skipping = question.llm, question.tokens[name], question.skipping_layers
    attending = tokens.retained + tokens.skipped
    skip_layer = paper_flops(attending, tokens.retained, llm.hidden_size, llm.intermediate_size)
    full_layer = paper_flops(attending, attending, llm.hidden_size, llm.intermediate_size)
    prefill, train = question.forward(name, head_tokens=1), question.training(name)
    answers, level = question.answers(name), question.level(name)
    return {
        "visual_tokens": attending + tokens.summaries,
        "sequence": tokens.sequence,
        "ffn_rows": tokens.ffn_rows,
        "paper_multiply_adds": skipping * skip_layer + (llm.num_hidden_layers - skipping) * full_layer,
        "prefill": prefill,
        "train": train,
        "kv_level": level,
        "kv_bytes_prefill": tokens.sequence * question.batch * kv_bytes_per_token(llm, question.dtype),
        "answer": answers,
        "batch": {
            "prefill": question.of_batch(prefill["total"]),
            "train": question.of_batch(train["total"], 3),
            "end_to_end": question.of_batch(answers[level]["end_to_end"]),
        },
        "memory": memory_of(question, name),
    }


def memory_of(question: Question, name: str) -> dict[str, int]:
    """Bytes that inference holds between steps: weights, and the cache at the end of the answer."""
    llm, setting, budget = question.llm, question.setting, question.budget
    counts = question.parameters or parameters(llm, setting, budget.summaries)
    weights = sum(count for part, count in counts.items() if name == "skip" or part != "summaries")
    weights *= BYTES[question.dtype]
    cache = question.answers(name)[question.level(name)]["kv_bytes_at_end"]
    return {"weights": weights, "kv_cache": cache, "total": weights + cache}


def ratio(sides: dict[str, dict[str, Any]], *path: str) -> float | None:
    """Skipping over dense; None where dense has none of it."""
    values = []
    for name in SIDES:
        value: Any = sides[name]
        for key in path:
            value = value[key]
        values.append(value)
    return None if not values[0] else values[1] / values[0]


def compare(question: Question) -> dict[str, Any]:
    """The JSON report: `paper_ratio`, `exact_ratio` (prefill), `train_ratio`, `decode_ratio`, `end_to_end_ratio`,
    `kv_ratio`, and every term under `dense` and `skip`."""
    llm, setting, budget = question.llm, question.setting, question.budget
    sides = {name: side_of(question, name) for name in SIDES}
    answers = {name: {"answer": side["answer"][side["kv_level"]]} for name, side in sides.items()}
    return {
        "family": question.family,
        "preset": question.preset,
        "num_retained": budget.retained,
        "num_skipped": budget.skipped,
        "retained_bounds": budget.retained_bounds and list(budget.retained_bounds),
        "skipping_layers": question.skipping_layers,
        "views": setting.views,
        "dense_tokens": setting.dense_tokens,
        "text_tokens": question.text_tokens,
        "supervised_tokens": question.supervised_tokens,
        "new_tokens": question.new_tokens,
        "batch": question.batch,
        "dtype": question.dtype,
        "trains": question.trains,
        "gradient_checkpointing": question.recompute,
        "paper_ratio": paper_ratio(
            budget.retained, budget.skipped, setting.dense_tokens, llm.hidden_size, llm.intermediate_size
        ),
        "exact_ratio": ratio(sides, "prefill", "total"),
        "exact_llm_ratio": ratio(sides, "prefill", "llm"),
        "train_ratio": ratio(sides, "train", "total"),
        "train_llm_ratio": ratio(sides, "train", "llm"),
        "decode_ratio": ratio(answers, "answer", "decode_per_token"),
        "end_to_end_ratio": ratio(answers, "answer", "end_to_end"),
        "kv_ratio": ratio(answers, "answer", "kv_bytes"),
        "dense": sides["dense"],
        "skip": sides["skip"],
        "parameters": question.parameters or parameters(llm, setting, budget.summaries),
        "llm": asdict(llm),
        "encoder": asdict(setting.encoder),
    }
