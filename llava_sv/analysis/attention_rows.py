"""The attention that each generated token was made with, taken down while `generate` runs as it always does.

`watch(model, level)` is entered by `analyze attention` around one generation of one conversation; its `Recorder` then
holds shares by group of tokens. The kernels stay torch's; beside them the weights of one row, the last query's, are
computed again in float32: H x T numbers a layer, reduced at once, never a T x T map.

S generated tokens, L layers, H heads, D width of a head, T positions of the prompt, n positions a layer attends to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava_sv.model.language_model.skip_cache import drops_any, kept_after_prefill
from llava_sv.model.token_groups import TokenRole

GROUPS = {
    "text": TokenRole.TEXT,
    "retained": TokenRole.RETAINED,
    "fine": TokenRole.FINE,
    "summary": TokenRole.SUMMARY,
    "skipped": TokenRole.SKIPPED,
    "generated": None,
}
"""What attention is told apart by; `generated`: tokens of the answer so far, the row's own included."""

FIRST = len(GROUPS)
"""One more column beside the groups: the sequence's first token alone, on which attention often rests."""

ROWS = "sdpa_rows"
_WATCHING: ContextVar[Recorder | None] = ContextVar("watching", default=None)


class Recorder:
    """Rows of one generation of one conversation.

    level: of the skip KV-cache, as `generate` is told; keep_rows: also keep the mean row over heads and tokens, or over
    heads of the generated token `only` (counted from 1).
    """

    def __init__(self, num_layers: int, level: str = "none", keep_rows: bool = False, only: int | None = None) -> None:
        self.num_layers, self.level, self.keep_rows, self.only = num_layers, level, keep_rows, only
        self.roles: Tensor | None = None
        """[T] of the prompt as spliced."""
        self._kept: Tensor | None = None
        self._onehot: dict[torch.device, Tensor] = {}
        self._columns: Tensor | None = None
        self._shares: list[list[Tensor]] = []
        self._seen: list[list[Tensor]] = []
        self._rows: list[Tensor] = []

    # -- while it runs --------------------------------------------------------------------------------------------

    def start_forward(self, roles: Tensor | None) -> None:
        """Before each pass. roles: [1, T] in the prefill, None when decoding."""
        self._check_whole()
        if roles is not None:
            if self.roles is not None or roles.shape[0] != 1:
                raise ValueError("one generation of one conversation at a time")
            self.roles = roles[0].cpu()
            keep = kept_after_prefill(roles, self.level)[0].cpu() if drops_any(roles, self.level) else None
            self._kept = torch.arange(len(self.roles)) if keep is None else keep.nonzero().flatten()
        if self.roles is None or self._kept is None:
            raise ValueError("the first pass carries no roles: generate from a prompt with an image")
        first, made, length = roles is not None, len(self._shares), len(self.roles)
        prompt = torch.arange(length) if first else self._kept
        self._columns = torch.cat([prompt, length + torch.arange(made)])
        self._onehot = {torch.device("cpu"): self._groups_of(self._columns)}
        self._shares.append([])
        self._seen.append([])

    def add(self, layer: int, weights: Tensor, visible: Tensor, windowed: bool) -> None:
        """The last query's row in one layer: weights [H, n] that sum to 1, visible bool [n]. windowed: the layer sees
        the latest positions only."""
        assert self._columns is not None
        count, width = weights.shape[-1], len(self._columns)
        if layer != len(self._shares[-1]) or count > width or (count < width and not windowed):
            raise RuntimeError(f"layer {layer} attends to {count} positions; expected {width} of the cache")
        onehot = self._onehot_on(weights.device, weights.dtype)[width - count :]
        self._shares[-1].append(weights @ onehot)
        self._seen[-1].append(visible.to(weights.dtype) @ onehot)
        if self.keep_rows and self.only in (None, len(self._shares)):
            self._keep(layer, weights.mean(0), self._columns[width - count :])

    def _keep(self, layer: int, row: Tensor, columns: Tensor) -> None:
        assert self.roles is not None
        if len(self._rows) == layer:
            self._rows.append(row.new_zeros(len(self.roles)))
        of_prompt = columns < len(self.roles)
        self._rows[layer].index_add_(0, columns[of_prompt].to(row.device), row[of_prompt.to(row.device)])

    def _groups_of(self, columns: Tensor) -> Tensor:
        """[n, groups + 1]: 1 where a position belongs to a group."""
        assert self.roles is not None
        generated = columns >= len(self.roles)
        roles = self.roles[columns.clamp(max=len(self.roles) - 1)].masked_fill(generated, -1)
        parts = [generated if role is None else roles == int(role) for role in GROUPS.values()]
        return torch.stack([*parts, columns == 0], dim=1).float()

    def _onehot_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if device not in self._onehot:
            self._onehot[device] = self._onehot[torch.device("cpu")].to(device)
        return self._onehot[device].to(dtype)

    def _check_whole(self) -> None:
        if self._shares and len(self._shares[-1]) != self.num_layers:
            raise RuntimeError(f"{len(self._shares[-1])} of {self.num_layers} layers told their attention")

    # -- afterwards -----------------------------------------------------------------------------------------------

    def shares(self) -> Tensor:
        """[S, L, H, groups + 1] on the CPU: attention by group, the last column being the first token's alone."""
        self._check_whole()
        return torch.stack([torch.stack([one.cpu() for one in step]) for step in self._shares])

    def seen(self) -> Tensor:
        """[S, L, groups + 1]: how many positions of each group the row could see."""
        return torch.stack([torch.stack([one.cpu() for one in step]) for step in self._seen])

    def rows(self) -> Tensor | None:
        """[L, T]: attention to each position of the prompt, mean over heads and generated tokens (`keep_rows`); None
        where the answer ended before the token that `only` names."""
        if not self._rows:
            return None
        return torch.stack([row.cpu() for row in self._rows]) / (1 if self.only else len(self._shares))


@contextmanager
def watch(model: Any, level: str = "none", keep_rows: bool = False, only: int | None = None) -> Iterator[Recorder]:
    """A `Recorder` of what `model` generates meanwhile, on torch's sdpa kernels whatever it was loaded with."""
    config = model.config
    recorder = Recorder(config.num_hidden_layers, level, keep_rows, only)
    before = config._attn_implementation
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: recorder.start_forward(kwargs.get("token_roles")), with_kwargs=True
    )
    token = _WATCHING.set(recorder)
    config._attn_implementation = ROWS
    try:
        yield recorder
    finally:
        config._attn_implementation = before
        _WATCHING.reset(token)
        hook.remove()


def sdpa_rows_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention; who watches is told the last row. query [1, H, t, D], key [1, H_kv, n, D]."""
    recorder = _WATCHING.get()
    if recorder is not None:
        weights, visible = last_row(query, key, attention_mask, scaling)
        windowed = kwargs.get("sliding_window") is not None
        recorder.add(module.layer_idx, weights, visible, windowed)  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(ROWS, sdpa_rows_forward)
AttentionMaskInterface.register(ROWS, sdpa_mask)


def last_row(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Weights [H, n] of the last query, and bool [n], what it sees. mask: bool [1, 1, t, n or more], or None: all.

    In float32, or float64 where the model is.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    last, keys = query[0, :, -1].to(dtype), key[0].to(dtype)
    grouped = last.view(keys.shape[0], -1, last.shape[-1])  # heads that share a key follow one another
    scores = (grouped @ keys.transpose(1, 2)).flatten(0, 1) * (last.shape[-1] ** -0.5 if scaling is None else scaling)
    count = keys.shape[1]
    if mask is None:
        return scores.softmax(-1), torch.ones(count, dtype=torch.bool, device=scores.device)
    visible = mask[0, 0, -1, :count]
    return scores.masked_fill(~visible, -torch.inf).softmax(-1), visible
