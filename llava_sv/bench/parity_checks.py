"""The checks of `gpu_parity`: what users run against the same written plainly, and both against float64.

A `Case` and a kernel arrive; for each quantity two relative errors leave: the tested path's and the plain path's. The
plain path shares with the tested one the layers' weights, attention (on the math kernel) and norms, and nothing else:
it runs the FFN on every row and masks what comes out, caches nothing, and sees one sample at a time.
B batch, P prompt, T sequence, K vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava_sv.bench.gpu_kernels import Attention, plain
from llava_sv.bench.models import BenchBatch, make_batch, make_pair
from llava_sv.bench.peers import has_peer, make_stock_llama, make_stock_llava, stock_inputs
from llava_sv.bench.presets import LlmSize
from llava_sv.bench.sizes import SIZES, BenchSize
from llava_sv.model.language_model.skip_cache import kept_after_prefill
from llava_sv.model.token_groups import KV_LEVELS, TokenRole, passes_ffn

LLM = LlmSize(512, 1792, 4, 4, 2, 1000)
"""Heads of 128 and grouped keys, as LLaMA-3-8B has them."""

TEXT, NEW_TOKENS, SHORTER = 48, 6, 7
"""Text tokens; tokens of an answer; how much shorter each sample of a padded batch is than the one before."""

Errors = dict[str, tuple[float, float]]
"""Quantity -> relative errors (tested path, plain path)."""

STATES = ("attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position", "position_embeddings")


@dataclass
class Case:
    """One family in one precision: models on the same weights, a batch of it, and the same in float64."""

    size: BenchSize
    device: torch.device
    dtype: torch.dtype
    dense: Any
    skip: Any
    wide: dict[str, Any]
    """dense, skip: the same models in float64."""
    batch: BenchBatch
    known: dict[Any, Any] = field(default_factory=dict)
    """What does not depend on the kernel, computed once."""

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()` of the first call with this key."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    @classmethod
    def make(cls, family: str, device: torch.device, dtype: torch.dtype) -> Case:
        """Random weights and a random batch."""
        size = replace(SIZES["tiny"][family], llm=LLM, text_tokens=TEXT)
        dense, skip = (model.eval() for model in make_pair(size, device, dtype))
        wide = {"dense": copy.deepcopy(dense).double(), "skip": copy.deepcopy(skip).double()}
        return cls(size, device, dtype, dense, skip, wide, make_batch(size, device, dtype))

    @torch.no_grad()
    def spliced(self, model: Any, row: int | None = None) -> Any:
        """The batch, or one sample of it, as the decoder reads it. The plain kernel serves the encoder."""
        rows = slice(None) if row is None else slice(row, row + 1)
        batch = self.batch
        with plain():
            return model.prepare_inputs_labels_for_multimodal(
                batch.input_ids[rows], labels=batch.labels[rows], images=batch.images[rows]
            )


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def errors_of(tested: dict[str, Tensor], plainly: dict[str, Tensor], wide: dict[str, Tensor]) -> Errors:
    """Both errors of each quantity."""
    return {name: (relative(tested[name], wide[name]), relative(plainly[name], wide[name])) for name in wide}


@contextlib.contextmanager
def masked_ffn(model: Any, roles: Tensor) -> Iterator[None]:
    """Every layer's FFN runs on all of [B, T], and is added where `roles` [B, T] say so."""
    passes = passes_ffn(roles).unsqueeze(-1)
    layers = list(model.model.layers)
    for layer in layers:
        layer.forward = functools.partial(_masked_layer, layer, passes)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _masked_layer(layer: Any, passes: Tensor, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    states = {name: value for name, value in kwargs.items() if name in STATES}
    attended, _ = layer.self_attn(layer.input_layernorm(hidden), *args, **states)
    hidden = hidden + attended
    ffn = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + torch.where(passes, ffn, torch.zeros_like(ffn))


# -- a training step: rows gathered against rows masked ---------------------------------------------------------------


def check_ffn(case: Case, attention: Attention) -> Errors:
    """Loss, logits of the rows that pass the FFN, and gradients of the embeddings and of the first layer."""
    spliced = case.once("skip", lambda: case.spliced(case.skip))
    rows = passes_ffn(spliced.token_roles)

    def step(model: Any, context: Any) -> dict[str, Tensor]:
        embeds = spliced.inputs_embeds.detach().to(model.dtype).requires_grad_()
        with context:
            out = model(
                inputs_embeds=embeds,
                position_ids=spliced.position_ids,
                token_roles=spliced.token_roles,
                labels=spliced.labels,
                use_cache=False,
            )
            out.loss.backward()
        weight = model.model.layers[0].self_attn.k_proj.weight
        found = {"loss": out.loss, "logits": out.logits[rows], "embeddings' gradient": embeds.grad}
        found = {**found, "keys' gradient": weight.grad.clone()}  # type: ignore[dict-item]
        model.zero_grad(set_to_none=True)
        return found  # type: ignore[return-value]

    def masked(model: Any) -> dict[str, Tensor]:
        with masked_ffn(model, spliced.token_roles):
            return step(model, plain())

    others = case.once("ffn", lambda: (masked(case.skip), masked(case.wide["skip"])))
    return errors_of(step(case.skip, attention()), *others)


# -- an answer: cached against computed anew --------------------------------------------------------------------------


@torch.no_grad()
def check_cache(case: Case, attention: Attention) -> Errors:
    """Logits of each new token at each KV level, against one pass over the whole sequence in which new rows do not see
    what has left the cache. The plain paths are given the tested one's tokens."""
    spliced = case.once("skip", lambda: case.spliced(case.skip))
    errors: Errors = {}
    for level in KV_LEVELS:
        if level == "fine+skipped" and case.size.family != "cos":
            continue
        with attention():
            out = case.skip.generate(
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.attention_mask.long(),
                position_ids=spliced.position_ids,
                token_roles=spliced.token_roles,
                skip_kv=level,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tested = {level: torch.stack(out.logits, dim=1)}
        tokens = out.sequences[:, -NEW_TOKENS:]
        others = case.once(
            (level, tuple(tokens.flatten().tolist())),
            functools.partial(_both_anew, case, spliced, tokens, level),
        )
        errors |= errors_of(tested, *others)
    return errors


def _both_anew(case: Case, spliced: Any, tokens: Tensor, level: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The plain path's logits, and those in float64."""
    narrow, wide = (_anew(model, spliced, tokens, level) for model in (case.skip, case.wide["skip"]))
    return {level: narrow}, {level: wide}


def _anew(model: Any, spliced: Any, tokens: Tensor, level: str) -> Tensor:
    """Logits [B, new, K] at the prompt's last position and each new token but the last."""
    batch, prompt = spliced.token_roles.shape
    further = tokens[:, :-1]
    embeds = torch.cat([spliced.inputs_embeds.to(model.dtype), model.model.embed_tokens(further)], dim=1)
    roles = torch.cat([spliced.token_roles, torch.full_like(further, int(TokenRole.TEXT)).to(torch.int8)], dim=1)
    length = embeds.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril().repeat(batch, 1, 1)
    visible[:, prompt:, :prompt] &= kept_after_prefill(spliced.token_roles, level).unsqueeze(1)
    positions = torch.arange(length, device=embeds.device).repeat(batch, 1)
    with masked_ffn(model, roles), plain():
        out = model(
            inputs_embeds=embeds,
            attention_mask=visible.unsqueeze(1),
            position_ids=positions,
            token_roles=roles,
            use_cache=False,
        )
    return out.logits[:, prompt - 1 :]


# -- a padded batch against one sample at a time ----------------------------------------------------------------------


@torch.no_grad()
def check_batch(case: Case, attention: Attention) -> Errors:
    """Logits of the rows that pass the FFN: three samples of different lengths, padded, against each alone."""
    one = case.once("skip", lambda: case.spliced(case.skip))
    whole = one.token_roles.shape[1]
    lengths = [whole, whole - SHORTER, whole - 2 * SHORTER]
    rows = [0, one.token_roles.shape[0] - 1, 0]
    embeds, roles = one.inputs_embeds[rows], one.token_roles[rows].clone()
    mask = torch.arange(whole, device=case.device).unsqueeze(0) < torch.tensor(lengths, device=case.device)[:, None]
    roles[~mask] = int(TokenRole.PAD)
    positions = torch.arange(whole, device=case.device).repeat(len(rows), 1)
    with attention():
        out = case.skip(
            inputs_embeds=embeds * mask.unsqueeze(-1),
            attention_mask=mask,
            position_ids=positions,
            token_roles=roles,
            use_cache=False,
        )
    passes = passes_ffn(roles)

    def alone(model: Any) -> Tensor:
        found = []
        for row, length in enumerate(lengths):
            own = roles[row : row + 1, :length]
            with masked_ffn(model, own), plain():
                logits = model(
                    inputs_embeds=embeds[row : row + 1, :length].to(model.dtype),
                    position_ids=positions[row : row + 1, :length],
                    token_roles=own,
                    use_cache=False,
                ).logits
            found.append(logits[0][passes[row, :length]])
        return torch.cat(found)

    others = case.once("batch", lambda: ({"logits": alone(case.skip)}, {"logits": alone(case.wide["skip"])}))
    return errors_of({"logits": out.logits[passes]}, *others)


@torch.no_grad()
def check_pixels(case: Case, attention: Attention) -> Errors | None:
    """What the decoder is given of a batch of pictures, against picture by picture: encoder, projector, selection,
    merging, summaries. In float32 alone: in less, which patches are alike depends on the rounding."""
    if case.dtype != torch.float32:
        return None
    batch, samples = case.batch, range(case.batch.input_ids.shape[0])
    with attention():
        tested = case.skip.prepare_inputs_labels_for_multimodal(batch.input_ids, images=batch.images).inputs_embeds
    double = replace(case, batch=replace(batch, images=batch.images.double()))

    def one_by_one(of: Case, model: Any) -> dict[str, Tensor]:
        return {"embeddings": torch.cat([of.spliced(model, row).inputs_embeds for row in samples])}

    others = case.once("pixels", lambda: (one_by_one(case, case.skip), one_by_one(double, case.wide["skip"])))
    return errors_of({"embeddings": tested}, *others)


# -- skipping off: transformers' own models ---------------------------------------------------------------------------


@torch.no_grad()
def check_stock(case: Case, attention: Attention) -> Errors:
    """Dense on spliced embeddings, and a skipping model on text alone, against transformers' LLaMA."""
    spliced = case.once("dense", lambda: case.spliced(case.dense))
    ids = case.batch.input_ids.clamp(min=0)

    def ours(model: Any, **inputs: Any) -> Tensor:
        with attention():
            return model(**inputs, use_cache=False).logits

    def stock(model: Any) -> dict[str, Tensor]:
        with plain():
            return {
                "dense": model(inputs_embeds=spliced.inputs_embeds.to(model.dtype), use_cache=False).logits,
                "text alone": model(input_ids=ids, use_cache=False).logits,
            }

    embeds, roles, positions = spliced.inputs_embeds, spliced.token_roles, spliced.position_ids
    tested = {
        "dense": ours(case.dense, inputs_embeds=embeds, token_roles=roles, position_ids=positions),
        "text alone": ours(case.skip, input_ids=ids),
    }

    def both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        narrow = make_stock_llama(case.dense).eval()
        return stock(narrow), stock(copy.deepcopy(narrow).double())

    return errors_of(tested, *case.once("stock", both))


@torch.no_grad()
def check_stock_llava(case: Case, attention: Attention) -> Errors | None:
    """Logits of a dense model from pixels, against transformers' LLaVA. Other families have no such peer."""
    if not has_peer(case.size):
        return None
    batch = case.batch
    with attention():
        tested = case.dense(input_ids=batch.input_ids, images=batch.images, use_cache=False).logits
    inputs = stock_inputs(batch, case.dense)
    del inputs["labels"]

    def from_pixels(model: Any) -> dict[str, Tensor]:
        pixels = inputs["pixel_values"].to(next(model.parameters()).dtype)
        with plain():
            return {"logits": model(**{**inputs, "pixel_values": pixels}, use_cache=False).logits}

    def both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        stock = make_stock_llava(case.dense).eval()
        return from_pixels(stock), from_pixels(copy.deepcopy(stock).double())

    return errors_of({"logits": tested}, *case.once("stock llava", both))


CHECKS: dict[str, Callable[[Case, Attention], Errors | None]] = {
    "gathered FFN against masked": check_ffn,
    "cached against recomputed": check_cache,
    "batch against single": check_batch,
    "pixels, batch against single": check_pixels,
    "dense against transformers' LLaMA": check_stock,
    "dense against transformers' LLaVA": check_stock_llava,
}
"""Name -> check; None: says nothing of this family or precision."""
