"""Skip-FFN on gathered rows against the masked plain loop: logits and every gradient (equations 4 and 5)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_sv.model.token_groups import TokenRole
from tests.parity.oracle import check_against_masked_loop, decode_one
from tests.parity.tiny import SKIP, ragged_batch, tiny_images, tiny_model

VARIANTS = {
    "all layers": {},
    "some layers": {"skip_layers": [0, 2]},
    "a range": {"skip_layers": "1-2"},
    "last visual token": {"last_visual_ffn": True},
    "no summaries": {"former_summary": False, "latter_summary": False},
    "no merge": {"merge": False},
    "attention selects": {"selection": "cls_attention"},
    "summary norm": {"summary_norm": "layernorm"},
    "skipping off": {"skip_ffn": False},
}


def spliced(model):
    ids, mask, labels, images = ragged_batch()
    return model.prepare_inputs_labels_for_multimodal(ids, mask, labels, tiny_images(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_the_masked_loop(variant):
    model = tiny_model({**SKIP, **VARIANTS[variant]})
    ids, mask, labels, count = ragged_batch()
    got = check_against_masked_loop(model, ids, mask, labels, tiny_images(count))
    if "skip_ffn" not in VARIANTS[variant] and variant != "no summaries":
        assert "model.mm_projector.summary.former.weight" in got


def test_the_oracle_tells_skipping_from_not():
    """The comparison above can fail: without the mask the logits differ by far more than its tolerance."""
    model = tiny_model()
    batch = spliced(model)
    real = batch.attention_mask[0]
    roles = batch.token_roles[0][real]
    assert (roles == TokenRole.SKIPPED).any()
    with torch.no_grad():
        args = batch.inputs_embeds[0][real], torch.arange(int(real.sum()))
        skipped = decode_one(model, *args, roles)
        everything = decode_one(model, *args, torch.full_like(roles, int(TokenRole.TEXT)))
    assert (skipped - everything).abs().max() > 1e-3


@pytest.mark.parametrize("skip", [None, SKIP])
@pytest.mark.parametrize("side", ["right", "left"])
def test_training_on_padded_batches_equals_evaluation_with_masks(skip, side):
    """While training, right padding needs no attention mask: the same loss and gradients as with one."""
    model = tiny_model(skip, tokenizer_padding_side=side)
    ids, mask, labels, images = ragged_batch()
    found = {}
    for training in (True, False):
        model.train(training).zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, images=tiny_images(images)).loss
        loss.backward()
        found[training] = [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(found[True]) == len(found[False])
    for trained, evaluated in zip(found[True], found[False]):
        torch.testing.assert_close(trained, evaluated, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = tiny_model(), tiny_model()
    ids, mask, labels, images = ragged_batch()
    plain.train()
    checkpointed.train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model(input_ids=ids, attention_mask=mask, labels=labels, images=tiny_images(images)).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_ffn_runs_on_the_retained_rows_only():
    """Counted, not believed: torch's FLOP counter sees the FFN's matrix products on R rows, 6 C M each."""
    model = tiny_model()
    ids, mask, _, images = ragged_batch()
    batch = model.prepare_inputs_labels_for_multimodal(ids, mask, images=tiny_images(images))
    rows = int(((batch.token_roles != TokenRole.PAD) & (batch.token_roles != TokenRole.SKIPPED)).sum())
    skipped = int((batch.token_roles == TokenRole.SKIPPED).sum())
    assert skipped == images * SKIP["num_skipped"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            token_roles=batch.token_roles,
        )
    config = model.config
    per_module = counter.get_flop_counts()
    counted = [sum(flops.values()) for name, flops in per_module.items() if name.endswith(".mlp")]
    assert counted == [6 * rows * config.hidden_size * config.intermediate_size] * config.num_hidden_layers
