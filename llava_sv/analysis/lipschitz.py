"""Constants that provably bound how far a decoder layer drives two sequences apart: the operator norms of Theorem 5.1
made true for RMSNorm, grouped queries, rotary positions, a gated FFN and residuals. docs/Theory.md proves each.

None is global: without the norm before them, attention and a gated FFN have no constant for all inputs. Each holds for
the two sequences at hand, x (full) and y (skipping), and is read off their own tokens. Called by `error_bound`.
T length, C width, H heads, G key heads, D head width, M FFN width; all norms are over all entries (Frobenius).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava_sv.analysis.gains import power_norm, steepest, upper_norm
from llava_sv.analysis.trajectory import Walk
from llava_sv.errors import UserError

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LayerNorms:
    """Spectral norms of a layer's matrices by name: `power` from below, `upper` from above."""

    power: dict[str, float]
    upper: dict[str, float]
    slope: float
    """Of the activation."""

    def theorem(self, head_dim: int) -> tuple[float, float]:
        """Theorem 5.1's products (L_attn, L_ffn), as the paper has them: no residual, no norm, W1 and W2 = up, down."""
        s = self.power
        return s["q"] * s["k"] * s["v"] / head_dim**0.5, s["up"] * s["down"]


def matrices_of(layer: Any) -> dict[str, Tensor]:
    """Weights by the names of `MATRICES`; `UserError` where a module's product is not that of one plain matrix."""
    modules = {name: getattr(layer.self_attn, f"{name}_proj") for name in MATRICES[:4]}
    modules |= {name: getattr(layer.mlp, f"{name}_proj") for name in MATRICES[4:]}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point() or hasattr(module, "lora_A"):
            raise UserError(
                f"--gains spectral: {name}_proj is a {type(module).__name__}, not one plain matrix; merge adapters "
                "first (llava-sv convert), or leave spectral out"
            )
    return {name: module.weight for name, module in modules.items()}


def norms_of(layer: Any, iterations: int) -> LayerNorms:
    """Of one decoder layer, in float64; heavy for large models, and the same for every picture."""
    weights = matrices_of(layer)
    power = {name: power_norm(weight, iterations) for name, weight in weights.items()}
    upper = {name: upper_norm(weight) for name, weight in weights.items()}
    return LayerNorms(power, upper, steepest(layer.mlp.act_fn))


def root_mean_squares(hidden: Tensor, norm: Any) -> Tensor:
    """[..., C] -> [...]: what the RMSNorm `norm` divides a token by."""
    return (hidden.double().pow(2).mean(-1) + norm.variance_epsilon).sqrt()


def norm_constant(norm: Any, x: Tensor, y: Tensor) -> float:
    """RMSNorm on two sets of tokens [..., C]: the largest weight over the geometric mean of a token's two roots."""
    roots = root_mean_squares(x, norm) * root_mean_squares(y, norm)
    return float(norm.weight.abs().max()) / float(roots.min().sqrt()) if roots.numel() else 0.0


def radius(points: Tensor) -> Tensor:
    """[G, T, D] -> [G]: how far the farthest point lies from the mean of all."""
    return (points - points.mean(1, keepdim=True)).norm(dim=-1).amax(1)


@dataclass
class Heads:
    """q [H, T, D], k and v [G, T, D] after norms and rotation, and the factor that norms may have had on them."""

    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor
    raw_k: Tensor


def heads_of(walk: Walk, index: int, normed: Tensor) -> Heads:
    """The layer's attention taken apart on [T, C] normalised tokens."""
    attention = walk.layers[index].self_attn
    split = (*normed.shape[:-1], -1, attention.head_dim)
    raw_q, raw_k, v = (
        getattr(attention, f"{name}_proj")(normed).view(split).transpose(0, 1) for name in ("q", "k", "v")
    )
    q = attention.q_norm(raw_q) if hasattr(attention, "q_norm") else raw_q
    k = attention.k_norm(raw_k) if hasattr(attention, "k_norm") else raw_k
    cos, sin = walk.inputs[index]["position_embeddings"]
    q, k = apply_rotary_pos_emb(q.unsqueeze(0), k.unsqueeze(0), cos, sin)
    return Heads(q[0], k[0], v, raw_q, raw_k)


def column_sums(walk: Walk, index: int, heads: Heads, changed: Tensor) -> Tensor:
    """[H]: the largest sum of a column of each head's attention [T, T], over columns of `changed` tokens: with rows
    that sum to 1, a bound on the square of its spectral norm there."""
    attention, mask = walk.layers[index].self_attn, walk.inputs[index].get("attention_mask")
    shared = heads.q.shape[0] // heads.k.shape[0]
    length = heads.q.shape[1]
    sums = []
    for head, query in enumerate(heads.q):
        scores = (query @ heads.k[head // shared].T) * attention.scaling
        if mask is None:
            hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[0, 0, :length, :length], -torch.inf)
        else:
            scores = scores + mask[0, 0, :length, :length]
        sums.append(scores.softmax(-1).double().sum(0)[changed].amax())
    return torch.stack(sums)


def attention_constant(walk: Walk, index: int, norms: LayerNorms, x: Tensor, y: Tensor, changed: Tensor) -> float:
    """Of causal attention, output projection included, on normalised tokens x and y [T, C].

    Values that differ pass through the same probabilities; probabilities that differ weigh the same values, and a
    softmax moves by a covariance: at most the values' radius times what the scores move by.
    """
    attention, upper = walk.layers[index].self_attn, norms.upper
    one, other = heads_of(walk, index, x), heads_of(walk, index, y)
    groups = one.k.shape[0]
    cos, sin = walk.inputs[index]["position_embeddings"]
    turn = float((cos.double() ** 2 + sin.double() ** 2).max().sqrt())  # 1, or the scaling of some rotary variants
    on_q = on_k = turn
    if hasattr(attention, "q_norm"):
        on_q *= norm_constant(attention.q_norm, one.raw_q[:, changed], other.raw_q[:, changed])
        on_k *= norm_constant(attention.k_norm, one.raw_k[:, changed], other.raw_k[:, changed])
    spread = radius(other.v).double() * attention.scaling  # [G]
    sharing = one.q.shape[0] // groups
    by_group = other.q.double().norm(dim=-1).amax(1).view(groups, sharing)  # the longest query of each head
    rows = int(walk.embeds.shape[0] - changed.nonzero()[0])  # whom a changed key can reach
    by_query = float((spread * radius(one.k).double()).max()) * on_q * upper["q"]
    by_key = float((spread * by_group.pow(2).sum(1).mul(rows).sqrt()).max()) * on_k * upper["k"]
    sums = column_sums(walk, index, one, changed).view(groups, sharing)
    by_value = float(sums.sum(1).max().sqrt()) * upper["v"]
    return upper["o"] * (by_query + by_key + by_value)


def ffn_constant(layer: Any, norms: LayerNorms, x: Tensor, y: Tensor) -> float:
    """Of down(act(gate(n)) * up(n)) on normalised tokens x and y [R, C]: the product rule with both largest factors."""
    if not x.shape[0]:
        return 0.0
    mlp, upper = layer.mlp, norms.upper
    largest_up = float(mlp.up_proj(x).abs().max())
    largest_gate = float(mlp.act_fn(mlp.gate_proj(y)).abs().max())
    return upper["down"] * (norms.slope * upper["gate"] * largest_up + upper["up"] * largest_gate)


@torch.no_grad()
def layer_constant(walk: Walk, index: int, norms: LayerNorms, x: Tensor, y: Tensor) -> dict[str, float]:
    """`total`: ||layer(x) - layer(y)|| is at most so many times ||x - y||, for these two sequences [T, C]. Beside it
    the constants of its `attention` and `ffn`, each with its norm and without its residual.

    (1 + attention) (1 + ffn): never below 1, whatever the weights.
    """
    layer = walk.layers[index]
    changed = (x != y).any(-1)
    if not bool(changed.any()):
        return {"attention": 0.0, "ffn": 0.0, "total": 1.0}
    scale = norm_constant(layer.input_layernorm, x[changed], y[changed])
    normed = layer.input_layernorm(x), layer.input_layernorm(y)
    attention = scale * attention_constant(walk, index, norms, *normed, changed)
    x, y = walk.attend(index, x), walk.attend(index, y)
    changed = (x != y).any(-1)
    x, y = x[changed], y[changed]
    scale = norm_constant(layer.post_attention_layernorm, x, y)
    normed = layer.post_attention_layernorm(x), layer.post_attention_layernorm(y)
    ffn = scale * ffn_constant(layer, norms, *normed)
    return {"attention": attention, "ffn": ffn, "total": (1 + attention) * (1 + ffn)}


@torch.no_grad()
def head_norms(model: Any) -> tuple[float, float]:
    """(How much longer lm_head makes a vector at most, how far apart it moves two logits at most, per unit of length):
    its spectral norm, and twice the reach of its rows around their mean."""
    weight = model.lm_head.weight
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UserError("lm_head is quantised: its norms cannot be read; load the checkpoint in full precision")
    rows = weight.double()
    return upper_norm(weight), 2 * float((rows - rows.mean(0)).norm(dim=1).max())
