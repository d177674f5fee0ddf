"""The constants of attention and FFN against docs/Theory.md's formulas, head by head and token by token.

That a bound holds says little where it is loose by powers of ten: a factor left out would still hold.
"""

from __future__ import annotations

import math

import pytest
import torch

from llava_sv.analysis.lipschitz import LayerNorms, attention_constant, ffn_constant, matrices_of
from tests.analysis.walks import tiny_walk
from tests.parity.oracle import rotate

HEADS, GROUPS, WIDTH, WINDOW = 4, 2, 8, 6
SLOPE = 1.09985
"""No SiLU is steeper."""


def exact_norms(layer):
    norms = {name: float(torch.linalg.matrix_norm(weight, 2)) for name, weight in matrices_of(layer).items()}
    return LayerNorms(norms, norms, SLOPE)


def two_sequences(seed):
    """Normalised tokens, of which some from the fourth on differ."""
    torch.manual_seed(seed)
    x = torch.randn(16, 16)
    changed = torch.zeros(16, dtype=torch.bool)
    changed[[3, 7, 8, 14]] = True
    return x, x + 0.5 * torch.randn(16, 16) * changed.unsqueeze(1), changed


def root(token, norm):
    return math.sqrt(float((token**2).mean()) + norm.variance_epsilon)


def heads_by_hand(walk, name, tokens):
    """{head: ([T, D] before, and after its norm and rotation)}; values have neither."""
    attention = walk.layers[0].self_attn
    module, norm = getattr(attention, f"{name}_proj"), getattr(attention, f"{name}_norm", None)
    made = tokens @ module.weight.T + (0 if module.bias is None else module.bias)
    found = {}
    for head in range(made.shape[1] // WIDTH):
        raw = made[:, head * WIDTH : (head + 1) * WIDTH]
        after = raw if norm is None else torch.stack([row * norm.weight / root(row, norm) for row in raw])
        if name != "v":
            cos, sin = walk.inputs[0]["position_embeddings"]
            after = rotate(after.unsqueeze(1), cos[0], sin[0])[:, 0]
        found[head] = raw, after
    return found


def farthest(rows):
    middle = sum(rows) / len(rows)
    return max(float((row - middle).norm()) for row in rows)


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_attention_by_the_page(decoder, seed):
    walk = tiny_walk(decoder, seed=seed)
    layer = walk.layers[0]
    norms, (x, y, changed) = exact_norms(layer), two_sequences(seed)
    q, k = (heads_by_hand(walk, name, x) for name in "qk")
    other_q, other_k, other_v = (heads_by_hand(walk, name, y) for name in "qkv")
    where = changed.nonzero().flatten().tolist()
    by_query, by_key, by_value = [], [], []
    for group in range(GROUPS):
        own = [head for head in range(HEADS) if head * GROUPS // HEADS == group]
        spread = farthest(other_v[group][1]) / math.sqrt(WIDTH)
        by_query.append(spread * farthest(k[group][1]))
        longest = [max(float(row.norm()) for row in other_q[head][1]) for head in own]
        by_key.append(spread * math.sqrt((16 - 3) * sum(length**2 for length in longest)))
        columns = 0.0
        for head in own:
            rows = torch.zeros(16, 16)
            for i in range(16):
                first = max(0, i + 1 - WINDOW) if decoder == "mistral" else 0
                scores = [float(q[head][1][i] @ k[group][1][j]) / math.sqrt(WIDTH) for j in range(first, i + 1)]
                rows[i, first : i + 1] = torch.tensor(scores).softmax(0)
            columns += max(float(rows[:, j].sum()) for j in where)
        by_value.append(columns)
    on_q = on_k = 1.0
    if decoder == "qwen3":
        on_q, on_k = (
            float(norm.weight.abs().max())
            * max(
                1 / math.sqrt(root(one[head][0][t], norm) * root(two[head][0][t], norm)) for head in one for t in where
            )
            for norm, one, two in ((layer.self_attn.q_norm, q, other_q), (layer.self_attn.k_norm, k, other_k))
        )
    s = norms.upper
    wanted = max(by_query) * on_q * s["q"] + max(by_key) * on_k * s["k"] + math.sqrt(max(by_value)) * s["v"]
    assert attention_constant(walk, 0, norms, x, y, changed) == pytest.approx(s["o"] * wanted, rel=1e-4)


@torch.no_grad()
def test_ffn_by_the_page():
    layer = tiny_walk(seed=3).layers[0]
    norms, (x, y, changed) = exact_norms(layer), two_sequences(3)
    x, y = x[changed], y[changed]
    largest_up = max(abs(float(row @ unit)) for row in x for unit in layer.mlp.up_proj.weight)
    gates = [float(row @ unit) for row in y for unit in layer.mlp.gate_proj.weight]
    largest_gate = max(abs(gate / (1 + math.exp(-gate))) for gate in gates)
    s = norms.upper
    wanted = s["down"] * (SLOPE * s["gate"] * largest_up + s["up"] * largest_gate)
    assert ffn_constant(layer, norms, x, y) == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_the_ffns_constant_is_nearly_reached():
    """One channel, down = gate = up = 1: where the gate is steepest, both terms of the product rule are needed."""
    layer = tiny_walk().layers[0]
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(layer.mlp, name).weight
        weight.zero_()
        weight[0, 0] = 1.0
    norms = LayerNorms({}, dict.fromkeys(("gate", "up", "down"), 1.0), SLOPE)
    x, y = torch.zeros(1, 16), torch.zeros(1, 16)
    x[0, 0], y[0, 0] = 2.41, 2.39
    reached = float((layer.mlp(x) - layer.mlp(y)).norm() / (x - y).norm())
    constant = ffn_constant(layer, norms, x, y)
    assert reached <= constant <= 1.01 * reached
