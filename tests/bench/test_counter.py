"""The arithmetic against torch's own counter on the real modules, and where the FFN ran."""

from __future__ import annotations

import pytest
import torch

from llava_sv.bench.clock import count_flops, flop_counter
from llava_sv.bench.exact import Tokens
from llava_sv.bench.flops import exact_flops, train_flops
from llava_sv.bench.models import make_batch, make_pair
from llava_sv.bench.presets import Setting, encoder_of
from llava_sv.bench.sizes import SIZES

SIZE = SIZES["tiny"]
CPU = torch.device("cpu")
WIDTH = SIZE.llm.hidden_size
LAYERS = SIZE.llm.num_hidden_layers
RETAINED, SKIPPED, DENSE, TEXT = SIZE.num_retained, SIZE.num_skipped, SIZE.dense_tokens, SIZE.text_tokens
SUMMARIES = 2
TOKENS = {
    "dense": Tokens(TEXT, DENSE),
    "skip": Tokens(TEXT, RETAINED, SKIPPED, SUMMARIES, merged_from=DENSE - RETAINED),
}


@pytest.fixture(scope="module")
def pair():
    dense, skip = make_pair(SIZE, "llava", CPU, torch.float32)
    return {"dense": dense, "skip": skip}


@pytest.fixture(scope="module")
def batch():
    return make_batch(SIZE, CPU, torch.float32)


def expected(name: str, model, head_tokens: int) -> dict[str, float]:
    encoder = encoder_of(model.config.to_dict())
    setting = Setting(encoder, 1, DENSE, RETAINED, SKIPPED)
    return exact_flops(SIZE.llm, encoder, setting, TOKENS[name], head_tokens)


def uncounted(name: str) -> int:
    """Scores of the summaries are a matrix times a vector, which torch's counter passes over."""
    return 2 * (RETAINED + SKIPPED) * WIDTH if name == "skip" else 0


def same(counted: float, one: float, name: str) -> bool:
    """Equal, but for rotary angles: torch counts them where it makes them by a product (frequency times position)."""
    rotary = SIZE.llm.head_dim * TOKENS[name].sequence
    return counted - SIZE.batch * one in (0, SIZE.batch * rotary)


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_forward_equals_torchs_counter(name, pair, batch):
    model = pair[name].eval()
    with torch.no_grad():
        counted = count_flops(lambda: model(input_ids=batch.input_ids, images=batch.images, logits_to_keep=1))
    assert same(counted, expected(name, model, head_tokens=1)["total"] - uncounted(name), name)


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_training_step_equals_torchs_counter(name, pair, batch):
    model = pair[name].train()
    counted = count_flops(
        lambda: model(input_ids=batch.input_ids, labels=batch.labels, images=batch.images).loss.backward()
    )
    model.zero_grad()
    supervised = int((batch.labels[0] >= 0).sum())
    assert supervised == TEXT // 2
    step = train_flops(expected(name, model, supervised))
    assert same(counted, step["total"] - 3 * uncounted(name), name)


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_ffn_ran_on_the_retained_rows_only(name, pair, batch):
    """Per module, from torch's counter: each layer's FFN saw text, retained and summary rows, and no other."""
    model = pair[name].eval()
    with torch.no_grad(), flop_counter() as counter:
        model(input_ids=batch.input_ids, images=batch.images)
    by_module = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    a_row = 6 * WIDTH * SIZE.llm.intermediate_size
    rows = TEXT + DENSE if name == "dense" else TEXT + RETAINED + SUMMARIES
    for layer in range(LAYERS):
        ffn = next(flops for module, flops in by_module.items() if module.endswith(f"model.layers.{layer}.mlp"))
        assert ffn == SIZE.batch * rows * a_row
        attention = next(f for module, f in by_module.items() if module.endswith(f"model.layers.{layer}.self_attn"))
        length = TOKENS[name].sequence
        heads, kv = SIZE.llm.num_attention_heads, SIZE.llm.num_key_value_heads
        projections = 2 * length * WIDTH * SIZE.llm.head_dim * (2 * heads + 2 * kv)
        assert attention == SIZE.batch * (projections + 4 * length**2 * heads * SIZE.llm.head_dim)


def test_both_models_hold_the_same_weights(pair):
    dense = {name: p.data_ptr() for name, p in pair["dense"].named_parameters()}
    skip = {name: p.data_ptr() for name, p in pair["skip"].named_parameters()}
    assert {name: skip[name] for name in dense} == dense
    assert all("summary" in name for name in set(skip) - set(dense))
