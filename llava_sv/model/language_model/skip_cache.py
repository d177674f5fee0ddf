"""Skip KV-cache (equation 7): after prefill, the keys and values of skipped tokens are physically removed.

Called by `causal_lm` between prefill and the first decode step. B batch, T cached length, T' what is left of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from llava_sv.errors import UserError
from llava_sv.model.token_groups import KV_LEVELS, TokenRole


def kept_after_prefill(token_roles: Tensor, level: str) -> Tensor:
    """bool [B, T]: the cached positions that stay at this level (Table 7). Padding never stays."""
    if level not in KV_LEVELS:
        raise UserError(f"skip_kv: unknown level {level!r}; known: {', '.join(KV_LEVELS)}")
    keep = token_roles != int(TokenRole.PAD)
    for role in KV_LEVELS[level]:
        keep = keep & (token_roles != int(role))
    return keep


def drops_any(token_roles: Tensor, level: str) -> bool:
    """Whether a prompt of these roles [B, T] holds anything that leaves the cache at this level."""
    return any(bool((token_roles == int(role)).any()) for role in KV_LEVELS[level])


def sliding_window(config: Any) -> int | None:
    """Positions that a layer with a sliding window sees, itself included; None where every layer sees all.

    config: a decoder's. Mistral's window is every layer's; Qwen's `layer_types` say which layers have one.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def cache_to_shrink(config: Any, total: int, level: str) -> DynamicCache | None:
    """The cache for a generation of `total` positions, prompt and answer; None: transformers' own will do.

    A sliding window is counted over cached positions, and means something else once some are removed. Where no sequence
    outgrows it, it hides nothing, and plain layers hold what the window's would: those can shrink. Raises `UserError`
    where a sequence may outgrow it.
    """
    window = sliding_window(config)
    if window is None:
        return None
    if total > window:
        raise UserError(
            f"skip_kv {level!r}: prompt and answer may take {total} positions, more than this language model's sliding "
            f"window of {window}; pass skip_kv='none', or ask for fewer new tokens"
        )
    return DynamicCache()


@torch.no_grad()
def shrink_cache(cache: Any, keep: Tensor) -> Tensor:
    """Drop every cached position where `keep` [B, T] is False, from every layer, and re-pack left-padded.

    Keys keep the rotation of their original position ids. The old tensors are released: memory falls.
    Returns the attention mask bool [B, T'] of what is left. Raises `ValueError` for a cache that cannot shrink.
    """
    check_can_shrink(cache)
    if bool(keep.all()):
        return keep
    counts = keep.sum(dim=1)
    length = int(counts.max())
    # a stable sort puts dropped positions first and keeps the order of the others: the last columns are the kept ones
    index = keep.to(torch.int8).sort(dim=1, stable=True).indices[:, keep.shape[1] - length :]
    rows: dict[Any, Tensor] = {}  # once a forward, not once a layer; layers may be spread over devices
    for layer in cache.layers:
        shape = layer.keys.shape[:3], layer.keys.device
        if shape not in rows:
            rows[shape] = _rows_of(index.to(layer.keys.device), *layer.keys.shape[1:3])
        layer.keys = _take(layer.keys, rows[shape], length)
        layer.values = _take(layer.values, rows[shape], length)
    column = torch.arange(length, device=keep.device)
    return column.unsqueeze(0) >= (length - counts).unsqueeze(1)


def check_can_shrink(cache: Any) -> None:
    """`ValueError` unless each layer holds plain key and value tensors of its own."""
    for layer in getattr(cache, "layers", [None]):
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"skip KV-cache needs transformers' DynamicCache, not {type(cache).__name__} with "
                f"{type(layer).__name__}; pass skip_kv='none', or leave cache_implementation out"
            )


def _rows_of(index_BT: Tensor, heads: int, length: int) -> Tensor:
    """Positions [B, T'] of each sample -> rows [B * H * T'] of a cache [B, H, T, D] seen as [B * H * T, D]."""
    first = torch.arange(index_BT.shape[0] * heads, device=index_BT.device).view(-1, heads, 1) * length
    return (index_BT.unsqueeze(1) + first).flatten()


def _take(states_BHTD: Tensor, rows: Tensor, length: int) -> Tensor:
    """[B, H, T', D], in memory of its own."""
    batch, heads, _, width = states_BHTD.shape
    return states_BHTD.flatten(0, 2).index_select(0, rows).view(batch, heads, length, width)


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind the cache's keys and values (of their storage, so a view hides nothing)."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
