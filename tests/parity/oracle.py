"""The method written plainly: loops, whole score maps, masks instead of gathers. Shared by no fast path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sv.model.token_groups import TokenRole


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """RoPE, the two halves of a head paired; the angles are transformers' own, which are float32 at any precision."""
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = (t[:, None, : first.shape[-1]] for t in (cos_TD, sin_TD))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(layer, x_TC: Tensor, angles: tuple[Tensor, Tensor], visible_TT: Tensor, config) -> Tensor:
    """Self-attention of one sample, head by head; row i sees column j where `visible_TT[i, j]`.

    Biases are the projections' own (Qwen2); `q_norm` and `k_norm` are Qwen3's; a head's width may be any.
    """
    attn, length = layer.self_attn, x_TC.shape[0]
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, attn.head_dim
    q = attn.q_proj(x_TC).view(length, heads, width)
    k = attn.k_proj(x_TC).view(length, kv_heads, width)
    v = attn.v_proj(x_TC).view(length, kv_heads, width)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k = rotate(q, *angles), rotate(k, *angles)
    out = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, shared].T / width**0.5
        out.append(scores.masked_fill(~visible_TT, -torch.inf).softmax(-1) @ v[:, shared])
    return attn.o_proj(torch.cat(out, dim=-1))


def within_window(config, index: int, length: int) -> Tensor:
    """bool [T, T]: the columns that layer `index` leaves visible: all, or the last `sliding_window` up to the row."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if window is None or (kinds and kinds[index] != "sliding_attention"):
        return torch.ones(length, length, dtype=torch.bool)
    return rows - columns < window


def decode_one(
    model, embeds_TC: Tensor, positions_T: Tensor, roles_T: Tensor, visible_TT: Tensor | None = None
) -> Tensor:
    """Logits [T, K] of one unpadded sample: FFN everywhere, then multiplied by a mask that is zero on skipped rows."""
    config = model.config
    length = embeds_TC.shape[0]
    if visible_TT is None:
        visible_TT = torch.ones(length, length, dtype=torch.bool).tril()
    skipping = set(config.skip_vision.layers_that_skip(config.num_hidden_layers)) if config.skip_vision else set()
    hidden = embeds_TC
    cos, sin = model.model.rotary_emb(embeds_TC.unsqueeze(0), positions_T.unsqueeze(0))
    for index, layer in enumerate(model.model.layers):
        visible = visible_TT & within_window(config, index, length)
        hidden = hidden + attention(layer, layer.input_layernorm(hidden), (cos[0], sin[0]), visible, config)
        normed = layer.post_attention_layernorm(hidden)
        ffn = layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
        if index in skipping:
            ffn = ffn * (roles_T != TokenRole.SKIPPED).to(ffn.dtype).unsqueeze(-1)
        hidden = hidden + ffn
    return model.model.norm(hidden) @ model.lm_head.weight.T


def check_against_masked_loop(model, ids: Tensor, mask: Tensor, labels: Tensor, images) -> set[str]:
    """Logits, loss and every gradient of a batch against `decode_one` on each sample; returns what got a gradient.

    A training batch goes without a mask, its padding being on the right; logits are None then.
    """
    out = model(input_ids=ids, attention_mask=mask, labels=labels, images=images)
    out.loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    batch = model.prepare_inputs_labels_for_multimodal(ids, mask, labels, images)
    losses = []
    for row in range(ids.shape[0]):
        real = batch.attention_mask[row]
        positions = torch.arange(int(real.sum()))
        logits = decode_one(model, batch.inputs_embeds[row][real], positions, batch.token_roles[row][real])
        if not model.training:
            torch.testing.assert_close(out.logits[row][real], logits, rtol=1e-9, atol=1e-10)
        losses.append(F.cross_entropy(logits[:-1], batch.labels[row][real][1:], reduction="sum"))
    loss = torch.stack(losses).sum() / int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert fast.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    return set(fast)


def greedy_recompute(
    model, embeds_TC: Tensor, roles_T: Tensor, dropped: tuple[TokenRole, ...], steps: int
) -> list[int]:
    """Greedy tokens by full recomputation: new rows do not see the dropped keys (equation 7)."""
    prompt = embeds_TC.shape[0]
    hidden_from_new = torch.zeros(prompt, dtype=torch.bool)
    for role in dropped:
        hidden_from_new |= roles_T == role
    tokens: list[int] = []
    for _ in range(steps):
        new = model.model.embed_tokens(torch.tensor(tokens, dtype=torch.long))
        embeds = torch.cat([embeds_TC, new.to(embeds_TC.dtype)])
        length = embeds.shape[0]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        visible[prompt:, :prompt] &= ~hidden_from_new
        roles = torch.cat([roles_T, torch.full((len(tokens),), int(TokenRole.TEXT), dtype=roles_T.dtype)])
        logits = decode_one(model, embeds, torch.arange(length), roles, visible)
        tokens.append(int(logits[-1].argmax()))
    return tokens


def merge_by_loops(tokens_NC: Tensor, kept: int) -> Tensor:
    """Section 4.1, one token at a time. [N, C] -> [min(kept, N), C]."""
    count = tokens_NC.shape[0]
    kept = min(kept, count)
    cosine = [[float(F.cosine_similarity(a, b, dim=0)) for b in tokens_NC.float()] for a in tokens_NC.float()]
    average = [sum(cosine[i][j] for j in range(count) if j != i) / max(count - 1, 1) for i in range(count)]
    stay = sorted(sorted(range(count), key=lambda i: average[i])[:kept])
    members = {i: [i] for i in stay}
    for i in range(count):
        if i not in members or i not in stay:
            members[max(stay, key=lambda j: cosine[i][j])].append(i)
    return torch.stack([sum(tokens_NC[j] for j in members[i]) / len(members[i]) for i in stay])


def summary_by_loop(tokens_NC: Tensor, weight_C: Tensor) -> Tensor:
    """Equation 6: sum_i softmax(x_i . w) x_i."""
    scores = [float(torch.dot(token, weight_C)) for token in tokens_NC]
    total = sum(torch.tensor(s, dtype=torch.float64).exp() for s in scores)
    pooled = torch.zeros_like(tokens_NC[0])
    for score, token in zip(scores, tokens_NC):
        pooled = pooled + torch.tensor(score, dtype=torch.float64).exp() / total * token
    return pooled


def single_samples(ids: Tensor, mask: Tensor, images):
    """Each sample of a batch alone: its unpadded ids [1, T] and its own images."""
    used = 0
    for row in range(ids.shape[0]):
        own = ids[row][mask[row]]
        count = int((own == IMAGE_TOKEN_INDEX).sum())
        yield own.unsqueeze(0), images[used : used + count]
        used += count
