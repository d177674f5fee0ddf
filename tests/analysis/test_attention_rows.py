"""Attention taken down during generation, against whole score maps of every prefix, head by head."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_sv.analysis.attention_rows import FIRST, GROUPS, Recorder, last_row, watch
from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.errors import UserError
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.model.token_groups import KV_LEVELS, TokenRole
from tests.parity import oracle
from tests.parity.test_decoders import KINDS, WINDOWED, model_of
from tests.parity.tiny import FAMILIES, family_images, family_model, tiny_images

STEPS = 5
PROMPT = torch.tensor([[3, 14, 15, IMAGE_TOKEN_INDEX, 92, 65, 35]])


def answer(model, images, level="none", keep_rows=True):
    """(recorder, new tokens) of a generation as users run it."""
    with watch(model, level, keep_rows) as recorder:
        tokens = model.generate(PROMPT, images=images, skip_kv=level, max_new_tokens=STEPS, do_sample=False)
    return recorder, tokens[0].tolist()


def last_rows(model, embeds, roles, visible, monkeypatch):
    """[L, H, T]: the last row of every head's score map, recomputed beside the plain decoder."""
    rows, plain = [], oracle.attention

    def noting(layer, x, angles, visible_TT, config):
        attn, width = layer.self_attn, layer.self_attn.head_dim
        q, k = attn.q_proj(x).unflatten(-1, (-1, width)), attn.k_proj(x).unflatten(-1, (-1, width))
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = oracle.rotate(q, *angles), oracle.rotate(k, *angles)
        heads = []
        for head in range(config.num_attention_heads):
            key = k[:, head * config.num_key_value_heads // config.num_attention_heads]
            scores = torch.stack([torch.dot(q[-1, head], one) for one in key]) / width**0.5
            heads.append(scores.masked_fill(~visible_TT[-1], -torch.inf).softmax(-1))
        rows.append(torch.stack(heads))
        return plain(layer, x, angles, visible_TT, config)

    with monkeypatch.context() as patch:
        patch.setattr(oracle, "attention", noting)
        oracle.decode_one(model, embeds, torch.arange(len(embeds)), roles, visible)
    return torch.stack(rows)


@torch.no_grad()
def check_against_recomputation(model, images, level, monkeypatch):
    recorder, tokens = answer(model, images, level)
    shares, seen, kept_rows = recorder.shares(), recorder.seen(), recorder.rows()
    batch = model.prepare_inputs_labels_for_multimodal(PROMPT, images=images)
    prompt, roles = batch.inputs_embeds[0], batch.token_roles[0]
    length, config = len(prompt), model.config
    hidden = [i for i in range(length) if TokenRole(int(roles[i])) in KV_LEVELS[level]]
    total = torch.zeros(config.num_hidden_layers, length, dtype=torch.float64)
    assert shares.shape == (STEPS, config.num_hidden_layers, config.num_attention_heads, FIRST + 1)
    for step in range(STEPS):
        new = model.model.embed_tokens(torch.tensor(tokens[:step], dtype=torch.long))
        visible = torch.ones(length + step, length + step, dtype=torch.bool).tril()
        visible[length:, hidden] = False
        of_new = torch.full((step,), int(TokenRole.TEXT), dtype=roles.dtype)
        rows = last_rows(model, torch.cat([prompt, new]), torch.cat([roles, of_new]), visible, monkeypatch)
        for index, (name, role) in enumerate(GROUPS.items()):
            columns = [i for i in range(length + step) if (i >= length if role is None else i < length)]
            columns = [i for i in columns if role is None or roles[i] == role]
            torch.testing.assert_close(shares[step, :, :, index], rows[:, :, columns].sum(-1), rtol=1e-9, atol=1e-11)
            for layer in range(config.num_hidden_layers):
                window = oracle.within_window(config, layer, length + step)[-1] & visible[-1]
                assert seen[step, layer, index] == int(window[columns].sum()), (name, step, layer)
        torch.testing.assert_close(shares[step, :, :, FIRST], rows[:, :, 0], rtol=1e-9, atol=1e-11)
        total += rows.mean(1)[:, :length]
    torch.testing.assert_close(kept_rows, total / STEPS, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(shares[..., :FIRST].sum(-1), torch.ones(shares.shape[:3]).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder(kind, monkeypatch):
    assert {decoder for decoder, _ in KINDS.values()} == set(DECODERS)
    check_against_recomputation(model_of(kind), tiny_images(1), "none", monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", KV_LEVELS)
def test_every_family_and_level(family, level, monkeypatch):
    if level == "fine+skipped" and family != "cos":
        with pytest.raises(UserError, match="has none"):
            answer(family_model(family), family_images(family, 1), level)
        return
    check_against_recomputation(family_model(family), family_images(family, 1), level, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_models(family, monkeypatch):
    check_against_recomputation(family_model(family, dense=True), family_images(family, 1), "none", monkeypatch)


@torch.no_grad()
def test_the_first_row_is_what_eager_attention_says():
    model = family_model("llava", dense=True)
    recorder, _ = answer(model, tiny_images(1))
    batch = model.prepare_inputs_labels_for_multimodal(PROMPT, images=tiny_images(1))
    model.set_attn_implementation("eager")
    maps = model(inputs_embeds=batch.inputs_embeds, output_attentions=True).attentions
    last = torch.stack([one[0, :, -1] for one in maps])
    for index, role in enumerate(GROUPS.values()):
        of_group = torch.zeros(last.shape[-1], dtype=torch.bool) if role is None else batch.token_roles[0] == role
        # eager attention rounds its weights to float32
        torch.testing.assert_close(recorder.shares()[0, :, :, index], last[..., of_group].sum(-1), rtol=1e-5, atol=1e-6)


def test_what_leaves_the_cache_gets_nothing_from_the_second_token_on():
    recorder, _ = answer(family_model("cos"), family_images("cos", 1), "fine+skipped")
    names = list(GROUPS)
    for name in ("fine", "skipped"):
        share, seen = recorder.shares()[..., names.index(name)], recorder.seen()[..., names.index(name)]
        assert (share[0] > 0).all()
        assert (seen[0] > 0).all()
        assert (share[1:] == 0).all()
        assert (seen[1:] == 0).all()


def test_the_row_of_one_token_alone():
    model, images = family_model("llava"), tiny_images(1)
    every = []
    for only in range(1, STEPS + 1):
        with watch(model, keep_rows=True, only=only) as recorder:
            model.generate(PROMPT, images=images, skip_kv="none", max_new_tokens=STEPS, do_sample=False)
        every.append(recorder.rows())
        text = recorder.roles == TokenRole.TEXT
        torch.testing.assert_close(every[-1][:, text].sum(1), recorder.shares()[only - 1].mean(1)[:, 0])
    torch.testing.assert_close(torch.stack(every).mean(0), answer(model, images)[0].rows())
    with watch(model, keep_rows=True, only=STEPS + 1) as recorder:
        model.generate(PROMPT, images=images, skip_kv="none", max_new_tokens=STEPS, do_sample=False)
    assert recorder.rows() is None


def test_watching_changes_no_answer_and_is_over_afterwards():
    model, images = family_model("llava"), tiny_images(1)
    options = dict(skip_kv="skipped", max_new_tokens=STEPS, do_sample=False)
    before = model.generate(PROMPT, images=images, **options)[0].tolist()
    assert answer(model, images, "skipped")[1] == before
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    with pytest.raises(ZeroDivisionError), watch(model) as recorder:
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert model.generate(PROMPT, images=images, **options)[0].tolist() == before
    assert recorder.roles is None


@pytest.mark.parametrize("kind", WINDOWED[:1])
def test_a_level_that_a_window_forbids_is_said(kind):
    with pytest.raises(UserError, match="sliding window"):
        answer(model_of(kind), tiny_images(1), "skipped")


def test_two_conversations_at_once_are_refused():
    model = family_model("llava")
    with pytest.raises(ValueError, match="one conversation at a time"), watch(model):
        model.generate(PROMPT.repeat(2, 1), images=tiny_images(2), max_new_tokens=2)


def test_a_cache_that_holds_something_else_is_no_silent_shift():
    recorder = Recorder(num_layers=2)
    recorder.start_forward(torch.tensor([[1, 3, 3, 1]]))
    row = torch.full((2, 3), 1 / 3)
    with pytest.raises(RuntimeError, match="layer 0 attends to 3 positions; expected 4 of the cache"):
        recorder.add(0, row, torch.ones(3, dtype=torch.bool), windowed=False)
    recorder.add(0, row, torch.ones(3, dtype=torch.bool), windowed=True)
    with pytest.raises(RuntimeError, match="1 of 2 layers told their attention"):
        recorder.start_forward(None)


def test_no_map_of_the_whole_prompt_is_made():
    """Taking a row down makes no tensor beyond a copy of the keys: of 300 positions, no 300 x 300 scores."""
    heads, shared, length, width = 8, 2, 300, 16
    query, key = torch.randn(1, heads, length, width).bfloat16(), torch.randn(1, shared, length, width).bfloat16()
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    largest = Largest()
    with largest:
        weights, visible = last_row(query, key, mask, None)
    assert largest.made == shared * length * width < heads * length * length
    assert weights.dtype == torch.float32
    assert visible.all()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation made memory for, views apart."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view() and not func.is_view:
            self.made = max(self.made, out.numel())
        return out
