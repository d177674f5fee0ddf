"""Timings: the KV bytes against the formula, and the arithmetic of medians against a fake clock."""

from __future__ import annotations

import pytest

from llava_sv.eval import timing
from llava_sv.eval.tasks import TASKS
from llava_sv.generation import load_for_inference, make_batch, user_turn
from llava_sv.mm_utils import load_image


def prompts(assistant, bench, count=1):
    questions = TASKS["toy"].load(bench)[:count]
    return [make_batch(assistant, [[user_turn(q.text, 1)]], [[load_image(q.images[0])]]) for q in questions]


def bytes_of(config, tokens):
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4 * tokens


def test_kv_bytes_before_and_after_removal(skip_assistant, dense_checkpoint, bench):
    config = skip_assistant.model.config
    ask = prompts(skip_assistant, bench)
    text = ask[0].input_ids.shape[1] - 1
    measured = timing.measure({"a": (skip_assistant, ask)}, repeats=1, new_tokens=3)["a"]
    skip = config.skip_vision
    assert measured.prompt_tokens == text + skip.num_retained + skip.num_skipped + 2
    assert measured.kv_bytes_prefill == bytes_of(config, measured.prompt_tokens)
    assert measured.kv_bytes == bytes_of(config, measured.prompt_tokens - skip.num_skipped)
    kept = timing.measure({"a": (skip_assistant, ask)}, skip_kv="none", repeats=1, new_tokens=3)["a"]
    assert kept.kv_bytes == kept.kv_bytes_prefill

    dense = load_for_inference(str(dense_checkpoint), device="cpu")
    measured = timing.measure({"a": (dense, prompts(dense, bench))}, repeats=1, new_tokens=3)["a"]
    assert measured.kv_bytes == measured.kv_bytes_prefill == bytes_of(config, text + config.num_patches)


def test_decode_time_is_what_further_tokens_add_and_contestants_take_turns(skip_assistant, bench, monkeypatch):
    # repeat by repeat: first token and whole answer of a, then of b
    clock = iter([7.0, 27.0, 70.0, 270.0, 9.0, 33.0, 90.0, 330.0, 8.0, 24.0, 80.0, 240.0])
    monkeypatch.setattr(timing, "_milliseconds", lambda run, on_cuda: next(clock))
    ask = prompts(skip_assistant, bench)
    measured = timing.measure({"a": (skip_assistant, ask), "b": (skip_assistant, ask)}, repeats=3, new_tokens=5)
    assert (measured["a"].time_to_first_token_ms, measured["a"].decode_ms_per_token) == (8.0, 5.0)
    assert (measured["b"].time_to_first_token_ms, measured["b"].decode_ms_per_token) == (80.0, 50.0)


def test_an_answer_has_exactly_the_tokens_asked_for(skip_assistant, bench):
    out = timing._runner(skip_assistant, prompts(skip_assistant, bench)[0], None, 7)()
    assert out.sequences.shape == (1, 7)


def test_nothing_to_time_is_refused(skip_assistant):
    with pytest.raises(ValueError, match=r"cannot time prompts \[0\]"):
        timing.measure({"a": (skip_assistant, [])})


def test_peak_memory_of_a_process_is_more_than_its_weights(skip_assistant):
    weights = sum(p.numel() * p.element_size() for p in skip_assistant.model.parameters())
    assert timing.peak_memory_bytes(skip_assistant.device) > weights
