"""Random tiny models of every family and decoder, and one sequence of each taken apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from llava_sv.analysis.trajectory import Walk, walk_of
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.model.token_groups import TokenRole

ROLES = {
    "llava": (4, 0, 5),
    "llava_hd": (6, 0, 9),
    "cos": (2, 4, 7),
}
"""Family -> retained, fine and skipped tokens, laid out as it lays them."""


def tiny_walk(decoder: str = "llama", family: str = "llava", seed: int = 0, std: float = 0.3, layers: int = 3) -> Walk:
    """A decoder with random weights on random embeddings, its masks and positions taken from its own forward."""
    torch.manual_seed(seed)
    one = DECODERS[decoder]
    more: dict[str, Any] = {"sliding_window": 6} if decoder == "mistral" else {}
    config = one.config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, **more,
    )  # fmt: skip
    model = one.model(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=std) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    model.set_attn_implementation("sdpa")
    retained, fine, skipped = ROLES[family]
    roles = [1, 1, *[3] * retained, *[4] * fine, 2, *[5] * skipped, 2, 1, 1, 1]
    embeds = torch.randn(1, len(roles), 16)
    spliced = SimpleNamespace(
        inputs_embeds=embeds,
        position_ids=torch.arange(len(roles)).unsqueeze(0),
        token_roles=torch.tensor([roles], dtype=torch.int8),
    )
    return walk_of(SimpleNamespace(model=model, splice=lambda sample: spliced), None)


def skipping_forward(walk: Walk, skips: list[int]) -> torch.Tensor:
    """[T, C] after the last layer, by the model's own layers; the norm after it undone by a hook."""
    ends = []
    hook = walk.layers[-1].register_forward_hook(lambda module, args, output: ends.append(output))
    for index, layer in enumerate(walk.layers):
        layer.skips = index in skips
    rows = (walk.roles != TokenRole.SKIPPED).nonzero().flatten()
    walk.model.model(inputs_embeds=walk.embeds.unsqueeze(0), use_cache=False, ffn_rows=rows)
    hook.remove()
    return (ends[0][0] if isinstance(ends[0], tuple) else ends[0])[0]
