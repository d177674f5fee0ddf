"""FLOPs of an answer, prefill and every decode step, and what its KV-cache holds, at each level of the skip KV-cache.

Called by `counts`; plain arithmetic. Sizes and one sample's tokens arrive. The first new token comes out of the
prefill; each further one is a decode step over all that is cached, itself included.
"""

from __future__ import annotations

from typing import Any

from llava_sv.bench.exact import Tokens
from llava_sv.bench.presets import LlmSize

REMOVED: dict[str, tuple[str, ...]] = {"none": (), "skipped": ("skipped",), "fine+skipped": ("fine", "skipped")}
"""KV level -> the tokens that leave the cache after prefill; names of `Tokens`. `model.token_groups` has the roles."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of one number."""


def levels_of(tokens: Tokens) -> tuple[str, ...]:
    """KV levels that say something of these tokens: a dense sequence has nothing to remove, few have a middle scale."""
    return ("none", *(["skipped"] if tokens.skipped else []), *(["fine+skipped"] if tokens.fine else []))


def cached_tokens(tokens: Tokens, level: str) -> int:
    """Positions whose keys and values stay after prefill."""
    return tokens.sequence - sum(getattr(tokens, role) for role in REMOVED[level])


def kv_bytes_per_token(llm: LlmSize, dtype: str) -> int:
    """Keys and values of one position in all layers: as wide as the key-value heads, not the query heads."""
    return 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * BYTES[dtype]


def decode_flops(llm: LlmSize, cached: int) -> dict[str, float]:
    """One decode step of one sample, by part; the new token attends to `cached` positions and to itself."""
    layers = llm.num_hidden_layers
    query_width = llm.num_attention_heads * llm.head_dim
    kv_width = llm.num_key_value_heads * llm.head_dim
    return {
        "llm_projections": layers * 4 * llm.hidden_size * (query_width + kv_width),
        "llm_attention": layers * 4 * (cached + 1) * query_width,
        "llm_ffn": layers * 6 * llm.hidden_size * llm.intermediate_size,
        "lm_head": 2 * llm.hidden_size * llm.vocab_size,
    }


def decode_total(llm: LlmSize, cached: int, steps: int) -> float:
    """All of `steps` decode steps: each attends to one position more than the one before."""
    if not steps:
        return 0.0
    first, last = (sum(decode_flops(llm, count).values()) for count in (cached, cached + steps - 1))
    return steps * (first + last) / 2


def answer(
    llm: LlmSize, tokens: Tokens, prefill: float, level: str, new_tokens: int, dtype: str, batch: int
) -> dict[str, Any]:
    """One answer of `new_tokens` at one KV level. FLOPs are one sample's, bytes the batch's."""
    cached, steps = cached_tokens(tokens, level), new_tokens - 1
    decoding = decode_total(llm, cached, steps)
    a_token = batch * kv_bytes_per_token(llm, dtype)
    return {
        "kv_tokens": cached,
        "kv_bytes": cached * a_token,
        "kv_bytes_at_end": (cached + steps) * a_token,
        "decode_first": sum(decode_flops(llm, cached).values()),
        "decode_per_token": decoding / steps if steps else None,
        "end_to_end": prefill + decoding,
    }
