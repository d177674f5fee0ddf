"""FLOPs of one sample, counted exactly: every matrix product from pixels to logits, forward and in training.

Called by `flops` and checked against torch's own counter. Two FLOPs a multiply-add; norms, activations, softmax and
rotary embedding are left out, as torch's counter leaves them out. Attention is counted over the whole T x T square.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_sv.bench.presets import Budget, EncoderSize, LlmSize, Setting


@dataclass(frozen=True)
class Tokens:
    """What one sample lays into its sequence."""

    text: int
    retained: int
    """Visual tokens that pass the FFN; all of them in a dense model."""
    skipped: int = 0
    """Visual tokens that do not."""
    summaries: int = 0
    merged_from: int = 0
    """Tokens that were merged down to `skipped`; 0 without merging."""
    pooled: int = 0
    """Tokens that the summaries pool."""
    fine: int = 0
    """Of the retained: those that the KV level `fine+skipped` removes."""
    last: int = 0
    """1 where the last skipped token passes the FFN: it counts among `retained`, and was merged with the skipped."""

    @property
    def merged_to(self) -> int:
        """Tokens that merging leaves."""
        return self.skipped + self.last

    @property
    def sequence(self) -> int:
        """T."""
        return self.text + self.retained + self.skipped + self.summaries

    @property
    def ffn_rows(self) -> int:
        """Rows that pass the FFN of a layer that skips."""
        return self.sequence - self.skipped


def skipping_tokens(text: int, budget: Budget) -> Tokens:
    """A sequence of `text` tokens and one image that skips. With `last_visual_ffn`, its last skipped token passes the
    FFN as a retained one does."""
    last = int(budget.last_visual_ffn)
    retained, skipped = budget.retained + last, budget.skipped - last
    return Tokens(text, retained, skipped, budget.summaries, budget.merged_from, budget.pooled, budget.fine, last)


def encoder_flops(encoder: EncoderSize, views: int = 1) -> dict[str, float]:
    """Patch embedding; projections and FFN of the blocks that run, and their attention."""
    rows, width, runs = encoder.rows, encoder.hidden_size, views * encoder.num_blocks
    return {
        "encoder_patches": views * 6 * encoder.patches * encoder.patch_size**2 * width,
        "encoder_blocks": runs * (8 * rows * width**2 + 4 * rows * width * encoder.intermediate_size),
        "encoder_attention": runs * 4 * rows**2 * width,
    }


def mlp_projector_flops(tokens: int, width: int, llm_width: int, depth: int = 2) -> dict[str, float]:
    """`depth` linear layers on each of `tokens` rows; none is the identity."""
    first = 2 * tokens * width * llm_width if depth else 0
    return {"projector_in": first, "projector_out": 2 * max(depth - 1, 0) * tokens * llm_width**2}


def resampler_flops(
    encoder: EncoderSize, windows: tuple[tuple[int, int], ...], levels: int, llm_width: int
) -> dict[str, float]:
    """CoS' resampler, E wide throughout: per level and scale, queries and outputs, keys and values, attention of each
    query to its own window (of so many cells a side), and a 4x MLP; then one linear layer."""
    width = encoder.hidden_size
    tokens = sum(queries for _, queries in windows)
    attended = sum(queries * cells**2 for cells, queries in windows)
    linear = 4 * (tokens + len(windows) * encoder.patches) * width**2 + 16 * tokens * width**2
    return {
        "resampler_linear": levels * linear,
        "resampler_attention": levels * 4 * attended * width,
        "projector_out": 2 * tokens * width * llm_width,
    }


def compression_flops(tokens: Tokens, llm_width: int) -> dict[str, float]:
    """Similarities of tokens that merge, to their sum and to those that stay; scores and pooling of the summaries."""
    merge = 2 * tokens.merged_from * (tokens.merged_to + 1) * llm_width
    return {"merge": merge, "summaries": 4 * tokens.pooled * llm_width}


def vision_flops(setting: Setting, tokens: Tokens, llm_width: int) -> dict[str, float]:
    """All that comes before the decoder on one image: encoder, projector, merging and summaries."""
    encoder = setting.encoder
    if setting.windows:
        projector = resampler_flops(encoder, setting.windows, setting.levels, llm_width)
    else:
        rows = setting.views * (encoder.patches + int(setting.projects_cls))
        projector = mlp_projector_flops(rows, encoder.hidden_size, llm_width, setting.projector_depth)
    return {**encoder_flops(encoder, setting.views), **projector, **compression_flops(tokens, llm_width)}


def llm_flops(llm: LlmSize, tokens: Tokens, head_tokens: int, skipping_layers: int | None = None) -> dict[str, float]:
    """The decoder on one sample. `skipping_layers` of its layers run the FFN on `tokens.ffn_rows` only (default: all).

    Projections count grouped-query attention: keys and values are `num_key_value_heads` wide. `head_tokens` positions
    reach lm_head.
    """
    skipping = llm.num_hidden_layers if skipping_layers is None else skipping_layers
    query_width = llm.num_attention_heads * llm.head_dim
    kv_width = llm.num_key_value_heads * llm.head_dim
    projections = 2 * tokens.sequence * llm.hidden_size * (2 * query_width + 2 * kv_width)
    attention = 4 * tokens.sequence**2 * query_width
    rows = skipping * tokens.ffn_rows + (llm.num_hidden_layers - skipping) * tokens.sequence
    return {
        "llm_projections": llm.num_hidden_layers * projections,
        "llm_attention": llm.num_hidden_layers * attention,
        "llm_ffn": 6 * rows * llm.hidden_size * llm.intermediate_size,
        "lm_head": 2 * head_tokens * llm.hidden_size * llm.vocab_size,
    }


def train_factors(train_llm: bool = True, train_encoder: bool = False) -> dict[str, float]:
    """What a training step costs of each part's forward: 1 forward, 1 for input gradients, 1 for weight gradients.

    Attention's backward is five products where its forward is two (flash kernels recompute the scores). A frozen
    encoder runs forward only, and an MLP's first layer then needs no input gradient (a resampler's layers do: norms
    that train come before them). The projector always trains.
    """
    linear = 3.0 if train_llm else 2.0
    return {
        "encoder_patches": 2.0 if train_encoder else 1.0,
        "encoder_blocks": 3.0 if train_encoder else 1.0,
        "encoder_attention": 3.5 if train_encoder else 1.0,
        "projector_in": 3.0 if train_encoder else 2.0,
        "resampler_linear": 3.0,
        "resampler_attention": 3.5,
        "projector_out": 3.0,
        "merge": 1.0,
        "summaries": 3.0,
        "llm_projections": linear,
        "llm_attention": 3.5,
        "llm_ffn": linear,
        "lm_head": 3.0 if train_llm else 2.0,
    }


def recomputed_flops(
    forward: dict[str, float], encoder: EncoderSize, full_rows: float, train_encoder: bool = False
) -> dict[str, float]:
    """What activation checkpointing runs once more: the decoder's layers, and the blocks of an encoder that trains.

    torch stops once it has all that the backward pass reads, before a layer's last product. Rows that a skipping layer
    adds back are read, and so its last product runs. full_rows: share of the FFN's work in layers that do not skip.
    """
    again = {name: forward[name] for name in ("llm_projections", "llm_attention")}
    again["llm_ffn"] = forward["llm_ffn"] * (1 - full_rows / 3)
    if train_encoder:
        last = encoder.intermediate_size / (4 * encoder.hidden_size + 2 * encoder.intermediate_size)
        again["encoder_blocks"] = forward["encoder_blocks"] * (1 - last)
        again["encoder_attention"] = forward["encoder_attention"]
    return again


def with_total(parts: dict[str, float]) -> dict[str, float]:
    """The parts, then their sums: `llm` (the decoder and its head) and `total`."""
    llm = sum(value for name, value in parts.items() if name.startswith(("llm_", "lm_head")))
    return {**parts, "llm": llm, "total": sum(parts.values())}
