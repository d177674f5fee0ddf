"""Cached decoding with removed keys against full recomputation; batches against single samples (equation 7)."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from llava_sv.errors import UserError
from llava_sv.model.language_model.skip_cache import cache_bytes, kept_after_prefill, shrink_cache
from llava_sv.model.token_groups import KV_LEVELS, TokenRole
from tests.parity.oracle import decode_one, greedy_recompute, single_samples
from tests.parity.tiny import SKIP, ragged_batch, tiny_images, tiny_model

STEPS = 8


@pytest.mark.parametrize("level", ["none", "skipped"])
@pytest.mark.parametrize("switches", [{}, {"last_visual_ffn": True}, {"skip_ffn": False}, {"skip_layers": "1-2"}])
def test_cached_decoding_equals_recomputation(level, switches):
    model = tiny_model({**SKIP, **switches})
    ids, mask, _, count = ragged_batch()
    images = tiny_images(count)
    together = model.generate(
        ids, attention_mask=mask, images=images, skip_kv=level, max_new_tokens=STEPS, do_sample=False
    )
    for row, (own, pixels) in enumerate(single_samples(ids, mask, images)):
        batch = model.prepare_inputs_labels_for_multimodal(own, images=pixels)
        expected = greedy_recompute(model, batch.inputs_embeds[0], batch.token_roles[0], KV_LEVELS[level], STEPS)
        assert together[row].tolist() == expected


def test_dropping_keys_matters_here():
    """The comparison above can fail: with and without skipped keys the logits differ."""
    model = tiny_model()
    ids, mask, _, count = ragged_batch()
    options = dict(images=tiny_images(count), max_new_tokens=STEPS, do_sample=False, output_logits=True)
    options |= dict(attention_mask=mask, return_dict_in_generate=True)
    kept = model.generate(ids, skip_kv="none", **options)
    dropped = model.generate(ids, skip_kv="skipped", **options)
    torch.testing.assert_close(kept.logits[0], dropped.logits[0])
    assert (kept.logits[1] - dropped.logits[1]).abs().max() > 1e-3


def test_fine_tokens_leave_at_their_level():
    """FINE roles put in by hand: prefill, shrink, one step, against a mask that hides them from the new token."""
    model = tiny_model()
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    batch = model.prepare_inputs_labels_for_multimodal(ids, images=tiny_images(count))
    batch.token_roles[0, 4:6] = int(TokenRole.FINE)
    expected = greedy_recompute(model, batch.inputs_embeds[0], batch.token_roles[0], KV_LEVELS["fine+skipped"], 3)
    cache = DynamicCache()
    out = model(
        inputs_embeds=batch.inputs_embeds,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        token_roles=batch.token_roles,
        past_key_values=cache,
        use_cache=True,
    )
    mask = shrink_cache(cache, kept_after_prefill(batch.token_roles, "fine+skipped"))
    position, tokens = batch.inputs_embeds.shape[1], [int(out.logits[0, -1].argmax())]
    while len(tokens) < 3:
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        step = torch.tensor([[tokens[-1]]])
        out = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=torch.tensor([[position]]),
            past_key_values=cache,
            use_cache=True,
        )
        position += 1
        tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == expected


def test_batch_equals_single_with_unequal_images_and_text():
    """Logits of every step, float64: left padding, two images, none, and a ragged re-packed cache."""
    model = tiny_model()
    ids, mask, _, count = ragged_batch()
    images = tiny_images(count)
    options = dict(max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    together = model.generate(ids, attention_mask=mask, images=images, **options)
    for row, (own, pixels) in enumerate(single_samples(ids, mask, images)):
        alone = model.generate(own, images=pixels if len(pixels) else None, **options)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        for step in range(STEPS):
            torch.testing.assert_close(together.logits[step][row], alone.logits[step][0], rtol=1e-5, atol=1e-6)


def test_the_side_of_the_prompt_s_padding_does_not_matter():
    model = tiny_model()
    ids, mask, _, count = ragged_batch()
    left_ids, left_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row in range(ids.shape[0]):
        length = int(mask[row].sum())
        left_ids[row, ids.shape[1] - length :] = ids[row, :length]
        left_mask[row, ids.shape[1] - length :] = True
    options = dict(images=tiny_images(count), max_new_tokens=STEPS, do_sample=False)
    right = model.generate(ids, attention_mask=mask, **options)
    left = model.generate(left_ids, attention_mask=left_mask, **options)
    assert right.tolist() == left.tolist()


def test_cache_bytes_before_and_after_removal():
    """Bytes behind all keys and values, by hand: 2 (K, V) x layers x kv heads x head size x 8."""
    model = tiny_model()
    config = model.config
    ids, mask, _, count = ragged_batch()
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8
    lengths = {}
    for level in ("none", "skipped"):
        out = model.generate(
            ids,
            attention_mask=mask,
            images=tiny_images(count),
            skip_kv=level,
            max_new_tokens=2,
            return_dict_in_generate=True,
        )
        lengths[level] = out.past_key_values.get_seq_length()
        assert cache_bytes(out.past_key_values) == per_position * lengths[level] * ids.shape[0]
    # the longest sample has two images; its prompt of 6 + 2 x 11 tokens is followed by one decoded key
    assert lengths["none"] == 6 + 2 * 11 + 1
    assert lengths["skipped"] == 6 + 2 * 6 + 1


def test_shrink_repacks_to_the_right_and_keeps_order():
    cache = DynamicCache()
    keys = torch.arange(2 * 5, dtype=torch.float64).view(2, 1, 5, 1)
    cache.update(keys, keys + 100, 0)
    keep = torch.tensor([[False, True, False, True, True], [True, False, False, False, True]])
    mask = shrink_cache(cache, keep)
    assert mask.tolist() == [[True, True, True], [False, True, True]]
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [1, 3, 4]
    assert cache.layers[0].keys[1, 0, 1:, 0].tolist() == [5, 9]
    assert cache.layers[0].values[1, 0, 1:, 0].tolist() == [105, 109]


@pytest.mark.parametrize("level", ["none", "skipped"])
def test_beams_equal_beams_alone(level):
    model = tiny_model()
    ids, mask, _, count = ragged_batch()
    images = tiny_images(count)
    options = dict(num_beams=3, max_new_tokens=5, do_sample=False, skip_kv=level)
    together = model.generate(ids, attention_mask=mask, images=images, **options)
    for row, (own, pixels) in enumerate(single_samples(ids, mask, images)):
        alone = model.generate(own, images=pixels if len(pixels) else None, **options)
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("level", ["none", "skipped"])
def test_one_beam_wins_by_its_score(level):
    """The best of as many beams as there are words is the likeliest pair of tokens, found by enumeration."""
    model = tiny_model()
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    images = tiny_images(count)
    found = model.generate(ids, images=images, num_beams=101, max_new_tokens=2, do_sample=False, skip_kv=level)
    batch = model.prepare_inputs_labels_for_multimodal(ids, images=images)
    prompt, roles = batch.inputs_embeds[0], batch.token_roles[0]
    visible = torch.ones(len(roles) + 1, len(roles) + 1, dtype=torch.bool).tril()
    for role in KV_LEVELS[level]:
        visible[-1, :-1] &= roles != int(role)
    with torch.no_grad():
        first = decode_one(model, prompt, torch.arange(len(roles)), roles)[-1].log_softmax(-1)
        second = []
        for word in model.model.embed_tokens.weight:
            embeds = torch.cat([prompt, word.unsqueeze(0)])
            longer = torch.cat([roles, roles.new_ones(1)])
            logits = decode_one(model, embeds, torch.arange(len(longer)), longer, visible)
            second.append(logits[-1].log_softmax(-1))
    best = int((first[:, None] + torch.stack(second)).argmax())
    assert found[0].tolist() == [best // 101, best % 101]


def test_sampling_follows_the_seed_and_returns_many():
    model = tiny_model()
    ids, mask, _, count = ragged_batch()
    options = dict(
        attention_mask=mask, images=tiny_images(count), do_sample=True, max_new_tokens=6, num_return_sequences=4
    )
    torch.manual_seed(0)
    first = model.generate(ids, **options)
    torch.manual_seed(0)
    assert first.tolist() == model.generate(ids, **options).tolist()
    assert first.shape == (12, 6)
    assert len({tuple(row) for row in first.tolist()}) > 3


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_gets_the_new_tokens():
    model = tiny_model()
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    streamer = Collect()
    out = model.generate(ids, images=tiny_images(count), max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


def test_an_unknown_level_lists_the_known():
    model = tiny_model()
    with pytest.raises(UserError, match=r"unknown level 'all'; known: none, skipped, fine\+skipped"):
        model.generate(torch.tensor([[1, 2]]), skip_kv="all")


def test_a_static_cache_is_refused_with_the_way_out():
    model = tiny_model()
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    with pytest.raises(ValueError, match="skip_kv='none'"):
        model.generate(ids, images=tiny_images(count), max_new_tokens=3, cache_implementation="static")


def test_without_a_mask_padding_is_found_as_transformers_finds_it():
    model = tiny_model()
    ids, mask, _, count = ragged_batch()
    options = dict(images=tiny_images(count), max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    assert (ids[mask] != 0).all(), "no prompt token looks like padding"
    assert model.generate(ids, **options).tolist() == model.generate(ids, attention_mask=mask, **options).tolist()


def test_one_prompt_may_come_without_a_batch_dimension():
    model = tiny_model()
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    options = dict(max_new_tokens=STEPS, do_sample=False)
    alone = model.generate(ids[0], images=tiny_images(count)[0], **options)
    assert alone.tolist() == model.generate(ids, images=tiny_images(count), **options).tolist()


def test_embeddings_with_roles_skip_too():
    model = tiny_model()
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    batch = model.prepare_inputs_labels_for_multimodal(ids, images=tiny_images(count))
    options = dict(max_new_tokens=STEPS, do_sample=False, skip_kv="skipped")
    given = dict(inputs_embeds=batch.inputs_embeds, position_ids=batch.position_ids, token_roles=batch.token_roles)
    expected = model.generate(ids, images=tiny_images(count), **options)
    assert model.generate(**given, **options).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="with `token_roles`"):
        model.generate(inputs_embeds=batch.inputs_embeds, **options)


def test_what_cannot_be_combined_is_said():
    model = tiny_model()
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    out = model.generate(ids, images=tiny_images(count), max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="starts from an empty cache"):
        model.generate(ids, images=tiny_images(count), past_key_values=out.past_key_values)
    with pytest.raises(ValueError, match="prefill_chunk_size does not work"):
        model.generate(ids, images=tiny_images(count), prefill_chunk_size=4)


def test_a_static_cache_serves_where_nothing_is_dropped():
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3, 4]])
    options = dict(max_new_tokens=4, do_sample=False)
    static = model.generate(ids, cache_implementation="static", **options)
    assert static.tolist() == model.generate(ids, **options).tolist()


def test_eager_and_sdpa_generate_alike():
    """float32: eager takes its softmax in float32 whatever the precision."""
    sdpa, eager = tiny_model().float(), tiny_model().float()
    eager.set_attn_implementation("eager")
    ids, mask, _, count = ragged_batch()
    options = dict(attention_mask=mask, images=tiny_images(count).float(), max_new_tokens=STEPS, do_sample=False)
    assert sdpa.generate(ids, **options).tolist() == eager.generate(ids, **options).tolist()
