"""`llava-sv flops` against torch's own counter: answers, settings, stages and decoders, on the real modules.

What the arithmetic says of a question must be what the very model of its config executes, to the last product.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_sv.bench.answer import REMOVED
from llava_sv.bench.checkpoint import budget_of, llm_of, parameters_of, setting_of
from llava_sv.bench.clock import count_flops
from llava_sv.bench.counts import Question, side_of
from llava_sv.bench.infer import our_generate
from llava_sv.bench.memory_trace import enable_checkpointing
from llava_sv.bench.models import make_batch, make_config, make_model
from llava_sv.bench.parameters import parameters
from llava_sv.bench.sizes import SIZES
from llava_sv.model.language_model.decoders import DECODERS, model_class
from llava_sv.model.language_model.skip_cache import cache_bytes
from llava_sv.model.token_groups import KV_LEVELS

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
NEW = 5


def config_of(family: str, decoder: str = "llama", **switches):
    """A tiny model's config over a decoder; dense where no switch is given."""
    size = TINY[family]
    budget = {"num_retained": size.num_retained, "num_skipped": size.num_skipped}
    config = make_config(size, {**budget, **switches} if switches else None)
    if decoder == "llama":
        return config
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    return DECODERS[decoder].config(**values)


def question_of(config, size) -> Question:
    """What `llava-sv flops --model-path` asks of it."""
    block = {"num_retained": size.num_retained, "num_skipped": size.num_skipped}
    skipping = config if config.skip_vision else make_config(size, block)
    asked = Question(config.mm_family, None, setting_of(skipping), llm_of(config), budget_of(skipping), 16, 8)
    return replace(asked, batch=size.batch, new_tokens=NEW, dtype="float32")


def model_of(config):
    torch.manual_seed(0)
    return model_class(config)._from_config(config, dtype=torch.float32)


def set_training(model, family: str, stage: str = "sft"):
    tower = model.get_model().vision_tower
    model.train().requires_grad_(stage == "sft")
    model.get_model().mm_projector.requires_grad_(True)
    tower.requires_grad_(False)
    if stage == "sft" and family == "cos":
        for parameter, _ in tower.used_parameters().values():
            parameter.requires_grad_(True)
    return model


def check(counted: float, expected: float, asked: Question, side: str, passes: int = 1) -> None:
    """Equal, but for what torch's counter does not see or counts besides, none of it the thousandth part: scores of the
    summaries (a matrix times a vector), and rotary angles where they are a product."""
    scores = passes * asked.batch * 2 * asked.budget.pooled * asked.llm.hidden_size if side == "skip" else 0
    positions = asked.tokens[side].sequence + NEW
    assert expected - scores <= counted <= expected - scores + asked.batch * asked.llm.head_dim * positions
    assert counted == pytest.approx(expected, rel=0.01)


SWITCHES = {
    "skipping": {"skip_ffn": True},
    "one layer": {"skip_layers": [1]},
    "no skip-FFN": {"skip_ffn": False},
    "no merging": {"merge": False},
    "last visual token": {"last_visual_ffn": True},
    "no former summary": {"former_summary": False},
    "no latter summary": {"latter_summary": False},
    "no summaries": {"former_summary": False, "latter_summary": False},
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("family", TINY)
def test_prefill_and_training_step_of_every_setting(family, switch):
    size, config = TINY[family], config_of(family, **SWITCHES[switch])
    asked, batch, model = question_of(config, size), make_batch(size, CPU, torch.float32), model_of(config)
    side = side_of(asked, "skip")
    with torch.inference_mode():
        counted = count_flops(lambda: model.eval()(batch.input_ids, images=batch.images, logits_to_keep=1))
    check(counted, side["batch"]["prefill"], asked, "skip")
    set_training(model, family)
    counted = count_flops(lambda: model(batch.input_ids, labels=batch.labels, images=batch.images).loss.backward())
    check(counted, side["batch"]["train"], asked, "skip", passes=3)


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skip"])
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("stage", "again"), [("pretrain", False), ("sft", True)], ids=["pretrain", "checkpointing"])
def test_other_training_steps(family, stage, again, skips):
    size, config = TINY[family], config_of(family, **({"skip_ffn": True} if skips else {}))
    asked = replace(question_of(config, size), trains=stage, recompute=again)
    batch, model, side = make_batch(size, CPU, torch.float32), model_of(config), "skip" if skips else "dense"
    set_training(model, family, stage)
    if again:
        enable_checkpointing(model)
    counted = count_flops(lambda: model(batch.input_ids, labels=batch.labels, images=batch.images).loss.backward())
    check(counted, side_of(asked, side)["batch"]["train"], asked, side, passes=3)


CASES = [(family, None) for family in TINY]
CASES += [(family, level) for family in TINY for level in KV_LEVELS if level != "fine+skipped" or family == "cos"]


@pytest.mark.parametrize(("family", "level"), CASES)
def test_answers_and_their_caches(family, level):
    """End to end, a decode step on average, and the cache's tokens and bytes; level None: dense."""
    size, side = TINY[family], "dense" if level is None else "skip"
    config = config_of(family, **({} if level is None else {"skip_kv": level}))
    asked, batch, model = question_of(config, size), make_batch(size, CPU, torch.float32), model_of(config).eval()
    assert set(asked.answers("skip")) == {"none", "skipped", *(["fine+skipped"] if family == "cos" else [])}
    answered = side_of(asked, side)
    assert answered["kv_level"] == (level or "none")
    row, generate = answered["answer"][level or "none"], our_generate(model, batch, level)
    with torch.inference_mode():
        cache = generate(1).past_key_values
        prefill, whole = (count_flops(lambda count=count: generate(count)) for count in (1, NEW))
        at_end = generate(NEW).past_key_values
    assert (row["kv_tokens"], row["kv_bytes"]) == (cache.get_seq_length(), cache_bytes(cache))
    assert row["kv_bytes_at_end"] == cache_bytes(at_end)
    check(whole, answered["batch"]["end_to_end"], asked, side)
    rotary = asked.batch * asked.llm.head_dim
    steps = asked.batch * row["decode_per_token"]
    assert 0 <= (whole - prefill) / (NEW - 1) - steps <= rotary
    assert row["decode_per_token"] == pytest.approx(row["decode_first"], rel=0.01)


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skip"])
@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "llama"])
def test_other_decoders(decoder, skips):
    size, config = TINY["llava"], config_of("llava", decoder, **({"skip_ffn": True} if skips else {}))
    asked, batch, model = question_of(config, size), make_batch(size, CPU, torch.float32), model_of(config)
    side = "skip" if skips else "dense"
    report = side_of(asked, side)
    with torch.inference_mode():
        whole = count_flops(lambda: our_generate(model.eval(), batch, None)(NEW))
    check(whole, report["batch"]["end_to_end"], asked, side)
    set_training(model, "llava")
    counted = count_flops(lambda: model(batch.input_ids, labels=batch.labels, images=batch.images).loss.backward())
    check(counted, report["batch"]["train"], asked, side, passes=3)


@pytest.mark.parametrize("family", TINY)
def test_parameters_by_arithmetic_are_the_model_s_own(family):
    config = config_of(family, skip_ffn=True)
    counted = parameters_of(config)
    assert parameters(llm_of(config), setting_of(config), 2) == counted
    assert sum(counted.values()) == sum(p.numel() for p in make_model(config, CPU, torch.float32).parameters())


@pytest.mark.parametrize("decoder", DECODERS)
def test_parameters_of_a_checkpoint_are_its_decoder_s(decoder):
    """Biases of Qwen2's projections are counted with them, norms of Qwen3's heads too; tied weights once."""
    config = config_of("llava", decoder)
    counted = parameters_of(config)
    assert sum(counted.values()) == sum(p.numel() for p in model_of(config).parameters())
    llm = llm_of(config)
    beside = {"qwen2": 2 * (128 + 64 + 64), "qwen3": 2 * 2 * llm.head_dim}.get(decoder, 0)
    by_arithmetic = parameters(llm, setting_of(question_config(config)), 0)
    assert counted["attention"] - by_arithmetic["attention"] == beside


def question_config(config):
    """`setting_of` reads a budget: the same config with one."""
    size = TINY[config.mm_family]
    return make_config(size, {"num_retained": size.num_retained, "num_skipped": size.num_skipped})


def test_levels_are_the_model_s():
    assert {level: tuple(role.name.lower() for role in roles) for level, roles in KV_LEVELS.items()} == REMOVED
