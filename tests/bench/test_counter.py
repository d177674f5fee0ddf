"""The arithmetic against torch's own counter on the real modules of every family, and where the FFN ran."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava_sv.bench.checkpoint import budget_of, llm_of, setting_of
from llava_sv.bench.clock import count_flops, flop_counter
from llava_sv.bench.flops import Question
from llava_sv.bench.models import make_batch, make_pair
from llava_sv.bench.sizes import SIZES, BenchSize

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
CASES: dict[str, BenchSize] = {
    **TINY,
    "llava_hd, part of the overview": replace(TINY["llava_hd"], num_retained=24),
    "cos, coarsest scale": replace(TINY["cos"], num_retained=4),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """dense, skip: the models; size, batch; asked: the `Question` that `llava-sv flops` asks of the skipping one."""
    size = CASES[request.param]
    dense, skip = make_pair(size, CPU, torch.float32)
    config = skip.config
    asked = Question(size.family, None, setting_of(config), llm_of(config), budget_of(config), size.text_tokens, 8)
    batch = make_batch(size, CPU, torch.float32)
    return SimpleNamespace(dense=dense, skip=skip, size=size, asked=asked, batch=batch)


def uncounted(case, name: str) -> int:
    """Scores of the summaries are a matrix times a vector, which torch's counter passes over."""
    return 2 * case.asked.budget.pooled * case.size.llm.hidden_size if name == "skip" else 0


def shared(case) -> int:
    """A resampler's learned queries are projected once at its first level, whatever the batch."""
    setting = case.asked.setting
    queries = sum(count for _, count in setting.windows)
    return (case.size.batch - 1) * 2 * queries * setting.encoder.hidden_size**2


def same(counted: float, expected: float, case, name: str) -> bool:
    """Equal, but for rotary angles: torch counts them where transformers makes them by a product (frequency times
    position), once for all samples where these have the same positions."""
    rotary = case.size.llm.head_dim * case.asked.tokens[name].sequence
    return counted - expected in (0, rotary, case.size.batch * rotary)


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_forward_equals_torchs_counter(name, case):
    model, batch = getattr(case, name).eval(), case.batch
    with torch.inference_mode():
        counted = count_flops(lambda: model(input_ids=batch.input_ids, images=batch.images, logits_to_keep=1))
    one = case.asked.forward(name, head_tokens=1)["total"] - uncounted(case, name)
    assert same(counted, case.size.batch * one - shared(case), case, name)


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_training_step_equals_torchs_counter(name, case):
    model, batch = getattr(case, name).train(), case.batch
    counted = count_flops(
        lambda: model(input_ids=batch.input_ids, labels=batch.labels, images=batch.images).loss.backward()
    )
    model.zero_grad()
    assert int((batch.labels[0] >= 0).sum()) == case.asked.supervised_tokens == case.size.text_tokens // 2
    one = case.asked.training(name)["total"] - 3 * uncounted(case, name)
    assert same(counted, case.size.batch * one - 3 * shared(case), case, name)


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_ffn_ran_on_the_retained_rows_only(name, case):
    """Per module, from torch's counter: each layer's FFN saw text, retained and summary rows, and no other."""
    model, batch, size = getattr(case, name).eval(), case.batch, case.size
    with torch.inference_mode(), flop_counter() as counter:
        model(input_ids=batch.input_ids, images=batch.images)
    by_module = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    llm, dense_tokens = size.llm, case.dense.config.visual_tokens_per_image()
    rows = size.text_tokens + (dense_tokens if name == "dense" else size.num_retained + 2)
    length = rows if name == "dense" else rows + size.num_skipped
    for layer in range(llm.num_hidden_layers):
        ffn = next(flops for module, flops in by_module.items() if module.endswith(f"model.layers.{layer}.mlp"))
        assert ffn == size.batch * rows * 6 * llm.hidden_size * llm.intermediate_size
        attention = next(f for module, f in by_module.items() if module.endswith(f"model.layers.{layer}.self_attn"))
        heads, kv = llm.num_attention_heads, llm.num_key_value_heads
        projections = 2 * length * llm.hidden_size * llm.head_dim * (2 * heads + 2 * kv)
        assert attention == size.batch * (projections + 4 * length**2 * heads * llm.head_dim)


def test_both_models_hold_the_same_weights(case):
    dense = {name: p.data_ptr() for name, p in case.dense.named_parameters()}
    skip = {name: p.data_ptr() for name, p in case.skip.named_parameters()}
    assert {name: skip[name] for name in dense} == dense
    assert all("summary" in name for name in set(skip) - set(dense))


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_what_trains_is_what_the_familys_recipe_trains(name, case):
    """CoS trains the part of its encoder that features depend on; the others' encoders are frozen."""
    model = getattr(case, name)
    tower = model.get_model().vision_tower
    used = set(tower.used_parameters()) if case.size.family == "cos" else set()
    assert {key for key, value in tower.named_parameters() if value.requires_grad} == used
    assert all(value.requires_grad for key, value in model.named_parameters() if ".vision_tower." not in key)
