"""Attention over packed rows: several samples one after another in a row, none of which sees another.

`packing_implementation` chooses the backend before a model is built, `packed_inputs` makes what a forward needs,
`check_keeps_apart` tries the backend out. B rows, T positions of a row, H heads, D width of a head, N samples.

- flash_attention_2: its kernel for unequal lengths, over the bounds of the samples;
- sdpa: becomes `sdpa_varlen`, registered here: torch's own kernel for unequal lengths on a GPU that has it, else one
  causal sdpa call a sample: no mask is held, and no score between two samples is computed;
- flex_attention, eager, and sdpa under a sliding window: transformers' block mask, which it makes of positions that
  restart.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava_sv.errors import UserError
from llava_sv.model.language_model.skip_cache import sliding_window

VARLEN = "sdpa_varlen"
BY_BOUNDS = (VARLEN, "flash_attention_2")
"""Backends that are told where samples begin and end; others read it from the positions."""


def packing_implementation(name: str | None, config: Any, max_length: int) -> str | None:
    """The backend to train with when `name` (None: transformers' choice, sdpa) is asked for.

    config: the decoder's. Where a sliding window is shorter than `max_length`, sdpa keeps to masks.
    """
    window = sliding_window(config)
    if name in (None, "sdpa") and (window is None or window >= max_length):
        return VARLEN
    return name


def packed_inputs(position_ids: Tensor, lengths: list[list[int]], implementation: str) -> dict[str, Any]:
    """Keywords of a decoder's forward for rows of several samples: position_ids [B, T] that restart, and the mask.

    lengths: of each row's samples, in order; what a row has beyond them is padding.
    """
    if implementation not in BY_BOUNDS:
        return {"position_ids": position_ids, "attention_mask": None}
    width = position_ids.shape[1]
    if implementation == VARLEN:
        # any mask of four dimensions is taken as it is: none is made, and this one is not read
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=position_ids.device)
        kernel = _kernel_for(position_ids.device)
        bounds = _bounds(lengths, width, position_ids.device) if kernel else {}
        return {"position_ids": position_ids, "attention_mask": unread, "sample_lengths": lengths, **bounds}
    return {"position_ids": position_ids, "attention_mask": None, **_bounds(lengths, width, position_ids.device)}


def _bounds(lengths: list[list[int]], width: int, device: torch.device) -> dict[str, Any]:
    """Where samples begin and end in all rows laid end to end, padding being one more sample of its row."""
    spans = [length for row in lengths for length in (*row, width - sum(row)) if length]
    ends = torch.tensor([0, *spans], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(spans, default=0)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def sdpa_varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sample_lengths: list[list[int]] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, T, H, D].

    Plain sdpa where no `sample_lengths` are given. Padding at the end of a row attends to nothing: it comes out as 0.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if window is not None and window < max((length for row in sample_lengths for length in row), default=0):
        raise ValueError(f"{VARLEN} knows no sliding windows, and a sample is longer than the window of {window}")
    kernel = _kernel_for(query.device)
    if kernel and torch.is_autocast_enabled(query.device.type):  # rotary positions leave query and key in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    if kernel and half and not dropout and cu_seq_lens_q is not None and max_length_q is not None:
        return _by_kernel(kernel, query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    rows = []
    for index, lengths in enumerate(sample_lengths):
        start, parts = 0, []
        for length in filter(None, lengths):  # a sample may be cut to nothing
            one = (slice(index, index + 1), slice(None), slice(start, start + length))
            parts.append(
                sdpa_attention_forward(module, query[one], key[one], value[one], None, dropout, scaling, True)[0]
            )
            start += length
        row = torch.cat(parts, dim=1) if parts else query.new_zeros(1, 0, query.shape[1], query.shape[3])
        rows.append(F.pad(row, (0, 0, 0, 0, 0, query.shape[2] - start)))
    return torch.cat(rows), None


AttentionInterface.register(VARLEN, sdpa_varlen_forward)
AttentionMaskInterface.register(VARLEN, sdpa_mask)


def _kernel_for(device: torch.device) -> Any:
    """torch's attention for unequal lengths, or None where this torch or this device has none."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return _load_kernel() if torch.cuda.get_device_capability(device) >= (8, 0) else None


@cache
def _load_kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _by_kernel(
    kernel: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    batch, heads, width, _ = query.shape
    shared = heads // key.shape[1]
    if shared > 1:
        key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
    flat = [states.transpose(1, 2).flatten(0, 1).contiguous() for states in (query, key, value)]
    known = inspect.signature(kernel).parameters
    # torch 2.10 said is_causal and knew no scale
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    default = query.shape[-1] ** -0.5
    if "scale" in known:
        options["scale"] = scale
    elif scale is not None and scale != default:
        flat[0] = flat[0] * (scale / default)
    return kernel(*flat, bounds, bounds, longest, longest, **options).view(batch, width, heads, -1)


@torch.no_grad()
def check_keeps_apart(name: str | None, device: torch.device) -> None:
    """`UserError` where attention `name` lets one packed sample see another: tried on a tiny decoder on `device`."""
    implementation = name or "sdpa"
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=8)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, attn_implementation=implementation)
    config = LlamaConfig(**shape)
    half = implementation == "flash_attention_2" or (implementation == VARLEN and _kernel_for(device) is not None)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model: Any = LlamaModel(config).eval()
        model.to(device=device, dtype=torch.bfloat16 if half else torch.float32)
        embeds = torch.randn(1, 19, 64, device=device, dtype=model.dtype)
    lengths = [7, 9]
    positions = torch.tensor([[*range(7), *range(9), *range(3)]], device=device)

    def run(inputs_embeds: Tensor, **packed: Any) -> Tensor:
        return model(inputs_embeds=inputs_embeds, use_cache=False, **packed).last_hidden_state[0]

    whole = run(embeds, **packed_inputs(positions, [lengths], implementation))
    alone = torch.cat([run(part) for part in embeds[:, :16].split(lengths, dim=1)])
    if not torch.allclose(whole[:16].float(), alone.float(), atol=3e-2 if half else 1e-4):
        raise UserError(
            f"--packing True: attention {implementation!r} lets packed samples see each other here; choose "
            "--attn_implementation sdpa (or flash_attention_2), or --packing False"
        )
