"""Skip-FFN (equations 4 and 5): a decoder layer whose FFN and its norm run on gathered rows only.

`enable_skip_ffn` turns a LLaMA-shaped decoder's layers into it; `causal_lm` computes the rows once a forward and sends
them along as the `ffn_rows` keyword. B batch, T sequence length, C width, R rows that pass the FFN.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from llava_sv.model.token_groups import passes_ffn


class SkipFFNMixin:
    """Over a decoder layer with `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`."""

    skips: bool = False
    """Whether this layer leaves the FFN out for rows not in `ffn_rows`."""

    def forward(self, hidden_states: Tensor, *args, ffn_rows: Tensor | None = None, **kwargs) -> Tensor:
        """hidden_states [B, T, C] -> [B, T, C]; `ffn_rows` [R] indexes the flattened B*T positions, None means all."""
        if ffn_rows is None or not self.skips:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)  # type: ignore[attr-defined]
        # all positions laid end to end; no view of another tensor, and nothing else keeps it: the FFN is added in place
        flat = hidden_states.flatten(0, 1) + attended.flatten(0, 1)
        ffn = self.mlp(self.post_attention_layernorm(flat.index_select(0, ffn_rows)))  # type: ignore[attr-defined]
        # under autocast the FFN's output is narrower than the residual stream, and `index_add_` does not promote
        return flat.index_add_(0, ffn_rows, ffn.to(flat.dtype)).view_as(hidden_states)


def enable_skip_ffn(layers: Iterable[nn.Module], kind: type[nn.Module], skip_layers: Iterable[int]) -> None:
    """Give each decoder layer the Skip-FFN forward of `kind`, and let those listed skip.

    kind: `SkipFFNMixin` over the layers' own class. A layer's class changes, its parameters stay where they are:
    nothing is allocated or partitioned anew under ZeRO-3. Raises `ValueError` for a layer of another class.
    """
    chosen = set(skip_layers)
    for index, layer in enumerate(layers):
        if type(layer) not in kind.__bases__:
            raise ValueError(f"{kind.__name__} is made for another decoder layer than {type(layer).__name__}")
        layer.__class__ = kind  # type: ignore[assignment]
        layer.skips = index in chosen  # type: ignore[assignment]


def rows_through_ffn(token_roles: Tensor, always: bool = False) -> Tensor | None:
    """Flat indices [R] of the rows of [B, T] whose FFN runs; None where every row's does (no gather is needed).

    always: give them even then. Training does: under ZeRO-3 with gradient checkpointing every rank must compute the
    same graph, whether its own batch has skipped rows and padding or not; else ranks wait for each other for ever.
    """
    mask = passes_ffn(token_roles).flatten()
    rows = mask.nonzero().flatten()
    return None if rows.numel() == mask.numel() and not always else rows
