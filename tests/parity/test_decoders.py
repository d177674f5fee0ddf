"""Every language model a LLaVA can be built over, by the same oracles: stock transformers, loops, recomputation.

Settings that tell decoders apart are on: windows shorter than the sequence, tied embeddings, wide heads.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from llava_sv.errors import UserError
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE, DECODERS
from llava_sv.model.language_model.skip_cache import cache_bytes, sliding_window
from llava_sv.model.token_groups import KV_LEVELS
from tests.parity.oracle import check_against_masked_loop, greedy_recompute, single_samples
from tests.parity.tiny import FAMILIES, SKIP, ragged_batch, tiny_images, tiny_model

KINDS = {
    "llama": ("llama", {}),
    "llama, tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 20}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 6, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window above": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, tied, window": (
        "qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5}
        | {"max_window_layers": 2},
    ),
}
FULL = [kind for kind in KINDS if "window" not in kind]
WINDOWED = [kind for kind in KINDS if "window" in kind]
LONGEST = 6 + 2 * 11
"""Positions of the longest sample of `ragged_batch`, skipping."""
STEPS = 6


def model_of(kind: str, skip: dict | None = SKIP, **overrides):
    decoder, settings = KINDS[kind]
    model = tiny_model(skip, decoder=decoder, **{**settings, **overrides})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_proj.bias", "q_norm.weight", "k_norm.weight")) and ".layers." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.tie_weights()
    return model


def stock_of(kind: str, model):
    """transformers' own model with this one's decoder weights."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    from transformers import CONFIG_MAPPING

    stock = AutoModelForCausalLM.from_config(CONFIG_MAPPING[KINDS[kind][0]](**config)).double().eval()
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if "vision" not in k and "mm_" not in k})
    return stock


def test_every_decoder_is_here():
    assert {decoder for decoder, _ in KINDS.values()} == set(DECODERS)
    for name, decoder in DECODERS.items():
        assert decoder.model_type == f"llava_{name}"
        assert BY_MODEL_TYPE[f"llava_{name}"] is decoder
    assert BY_MODEL_TYPE["llava_qwen"] is DECODERS["qwen2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [None, {**SKIP, "skip_ffn": False}], ids=["dense", "skip_ffn off"])
def test_without_skipping_it_is_the_stock_model_bit_for_bit(kind, skip):
    model = model_of(kind, skip)
    stock = stock_of(kind, model)
    assert type(stock).__name__ == type(model).__name__.replace("Llava", "", 1)
    ids, mask, labels, count = ragged_batch()
    batch = model.prepare_inputs_labels_for_multimodal(ids, mask, labels, tiny_images(count))
    given = dict(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask)
    with torch.no_grad():
        ours = model(**given, position_ids=batch.position_ids, token_roles=batch.token_roles).logits
        theirs = stock(**given, position_ids=batch.position_ids).logits
    real = batch.attention_mask
    assert torch.equal(ours[real], theirs[real])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switches", [{}, {"skip_layers": [0, 2]}], ids=["all layers", "some layers"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_and_gradients_equal_the_masked_loop(kind, switches, training):
    """In training the batch goes without a mask, its padding being on the right."""
    model = model_of(kind, {**SKIP, **switches}).train(training)
    ids, mask, labels, count = ragged_batch()
    check_against_masked_loop(model, ids, mask, labels, tiny_images(count))


@pytest.mark.parametrize("kind", WINDOWED)
def test_the_window_matters_here(kind):
    """The comparisons above can fail: without its window the same model says something else."""
    model, wide = model_of(kind), model_of(kind, sliding_window=200)
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    with torch.no_grad():
        a, b = (m(input_ids=ids, images=tiny_images(count)).logits for m in (model, wide))
    assert (a - b).abs().max() > 1e-3


def check_generation(model, level: str) -> None:
    """A ragged batch, each sample alone, and recomputation without any cache agree."""
    ids, mask, _, count = ragged_batch()
    images = tiny_images(count)
    options = dict(skip_kv=level, max_new_tokens=STEPS, do_sample=False)
    together = model.generate(ids, attention_mask=mask, images=images, **options)
    for row, (own, pixels) in enumerate(single_samples(ids, mask, images)):
        alone = model.generate(own, images=pixels if len(pixels) else None, **options)
        assert together[row].tolist() == alone[0].tolist()
        batch = model.prepare_inputs_labels_for_multimodal(own, images=pixels)
        expected = greedy_recompute(model, batch.inputs_embeds[0], batch.token_roles[0], KV_LEVELS[level], STEPS)
        assert together[row].tolist() == expected


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("level", KV_LEVELS)
def test_cached_decoding_equals_recomputation(kind, level):
    """The middle scale, which `fine+skipped` drops, is CoS's."""
    family = "cos" if level == "fine+skipped" else "llava"
    budget, settings = FAMILIES[family]
    check_generation(model_of(kind, budget, mm_family=family, **settings), level)


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_short_window_decodes_with_the_whole_cache(kind):
    check_generation(model_of(kind), "none")


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("level", ["none", "skipped"])
def test_a_window_that_nothing_outgrows_is_full_attention(kind, level):
    check_generation(model_of(kind, sliding_window=LONGEST + STEPS), level)


@pytest.mark.parametrize("kind", WINDOWED)
def test_beams_under_a_wide_window_equal_full_attention_s(kind):
    ids, mask, _, count = ragged_batch()
    options = dict(attention_mask=mask, images=tiny_images(count), num_beams=3, max_new_tokens=STEPS, do_sample=False)
    found = []
    for window in (LONGEST + STEPS, None):
        model = model_of(kind)
        model.config.sliding_window = window
        if window is None and getattr(model.config, "layer_types", None):
            model.config.layer_types = ["full_attention"] * model.config.num_hidden_layers
        found.append(type(model)(model.config).double().eval())
        found[-1].load_state_dict(model.state_dict())
    a, b = (model.generate(ids, skip_kv="skipped", **options).tolist() for model in found)
    assert a == b


@pytest.mark.parametrize("kind", WINDOWED)
def test_keys_leave_memory_under_a_wide_window_too(kind):
    model = model_of(kind, sliding_window=LONGEST + STEPS)
    ids, mask, _, count = ragged_batch()
    found = {}
    for level in ("none", "skipped"):
        out = model.generate(
            ids, attention_mask=mask, images=tiny_images(count), skip_kv=level, max_new_tokens=2, do_sample=False
        )
        cache = DynamicCache()
        model.generate(
            ids,
            attention_mask=mask,
            images=tiny_images(count),
            skip_kv=level,
            max_new_tokens=2,
            past_key_values=cache,
            do_sample=False,
        )
        found[level] = out.tolist(), cache_bytes(cache)
    width = model.model.layers[0].self_attn.head_dim
    per_position = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * width * 8 * ids.shape[0]
    assert found["none"][1] == per_position * (LONGEST + 1)
    assert found["skipped"][1] == per_position * (LONGEST - 2 * SKIP["num_skipped"] + 1)


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_may_be_outgrown_is_said_before_anything_runs(kind):
    model = model_of(kind, sliding_window=LONGEST + STEPS - 1)
    ids, mask, _, count = ragged_batch()
    options = dict(attention_mask=mask, images=tiny_images(count), do_sample=False)
    with pytest.raises(
        UserError, match=f"may take {LONGEST + STEPS} positions, .* window of {LONGEST + STEPS - 1}; pass"
    ):
        model.generate(ids, max_new_tokens=STEPS, **options)
    with pytest.raises(UserError, match="skip_kv='none'"):
        model.generate(ids, max_length=LONGEST + STEPS, **options)
    model.generate(ids, max_new_tokens=STEPS - 1, **options)
    model.generate(ids, max_new_tokens=STEPS, skip_kv="none", **options)
    with pytest.raises(UserError, match=f"may take {LONGEST + 20} positions"):
        model.generate(ids, **options)  # transformers' own default: 20 new tokens
    model.generation_config.max_new_tokens = STEPS
    with pytest.raises(UserError, match=f"may take {LONGEST + STEPS} positions"):
        model.generate(ids, generation_config=GenerationConfig(), **options)
    text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=STEPS, do_sample=False)
    assert text.shape == (1, STEPS), "without an image nothing is dropped, and any length will do"


def test_windows_are_read_as_transformers_reads_them():
    windows = {kind: sliding_window(model_of(kind).config) for kind in KINDS}
    assert {kind for kind, window in windows.items() if window} == set(WINDOWED)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "tied" in kind])
def test_tied_embeddings_are_one_tensor(kind):
    model = model_of(kind)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_logits(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.config.skip_vision == model.config.skip_vision
    ids, mask, _, count = ragged_batch()
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask, images=tiny_images(count)).logits for m in (model, loaded))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(kind):
    found = []
    for checkpointed in (False, True):
        model = model_of(kind).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask, labels, images = ragged_batch()
        model(input_ids=ids, attention_mask=mask, labels=labels, images=tiny_images(images)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-14)
