"""The chunked loss against torch's cross entropy, and what a model without supervised positions gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava_sv.model.language_model import loss as loss_module
from llava_sv.model.language_model.loss import LMHead, supervised_positions
from llava_sv.model.token_groups import TokenRole, is_visual
from tests.parity.tiny import ragged_batch, tiny_images, tiny_model


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("frozen", ["nothing", "head", "hidden"])
def test_chunked_loss_equals_cross_entropy(monkeypatch, chunk_rows, frozen):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_rows * 29)
    torch.manual_seed(0)
    head = LMHead(8, 29, bias=False).double()
    head.weight.requires_grad_(frozen != "head")
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=frozen != "hidden")
    targets = torch.randint(0, 29, (10,))
    total = head(hidden, labels=targets)
    wanted = [t for t in (hidden, head.weight) if t.requires_grad]
    ours = torch.autograd.grad(total / 7, wanted)
    expected = F.cross_entropy(F.linear(hidden, head.weight), targets, reduction="sum")
    torch.testing.assert_close(total, expected)
    for a, b in zip(ours, torch.autograd.grad(expected / 7, wanted)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_chunked_loss_under_autocast(monkeypatch, chunk_rows):
    """float32 weights, bf16 compute, as `--bf16` trains without DeepSpeed: like torch's cross entropy there."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_rows * 29)
    torch.manual_seed(0)
    head = LMHead(8, 29, bias=False)
    hidden, targets = torch.randn(10, 8, requires_grad=True), torch.randint(0, 29, (10,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = head(hidden, labels=targets)
        expected = F.cross_entropy(F.linear(hidden, head.weight).float(), targets, reduction="sum")
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    exact = F.cross_entropy(F.linear(hidden, head.weight), targets, reduction="sum")
    wanted = torch.autograd.grad(exact, (hidden, head.weight))
    for gradient, full in zip(torch.autograd.grad(ours, (hidden, head.weight)), wanted):
        assert gradient.dtype == torch.float32
        assert (gradient - full).norm() < 0.01 * full.norm()


def test_a_second_backward_pass_is_refused():
    """Gradients are scaled in place: a second pass would scale them twice."""
    head = LMHead(8, 29, bias=False)
    total = head(torch.randn(3, 8), labels=torch.tensor([1, 2, 3]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_supervised_positions_predict_the_next_token():
    labels = torch.tensor([[-100, 5, -100, 6], [7, -100, 8, 9]])
    rows, targets = supervised_positions(labels)
    assert rows.tolist() == [0, 2, 5, 6]
    assert targets.tolist() == [5, 6, 8, 9]


def test_num_items_in_batch_divides_the_sum():
    model = tiny_model()
    ids, mask, labels, images = ragged_batch()
    options = dict(input_ids=ids, attention_mask=mask, labels=labels, images=tiny_images(images))
    mean = model(**options).loss
    supervised = int((labels[:, 1:] != -100).sum())
    for count in (13, torch.tensor(13)):
        torch.testing.assert_close(model(**options, num_items_in_batch=count).loss, mean * supervised / 13)


def test_nothing_supervised_is_zero_with_gradients_everywhere():
    model = tiny_model().train()
    ids = torch.tensor([[1, 2, 3]])
    out = model(input_ids=ids, labels=torch.full_like(ids, -100))
    out.loss.backward()
    assert out.loss.item() == 0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_training_gives_no_logits_and_evaluation_does():
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids, labels=ids).logits.shape == (1, 3, 101)
    assert model.train()(input_ids=ids, labels=ids).logits is None


def test_text_only_batches_run_the_encoder_with_no_weight():
    """Gradients of a text-only batch equal those without the dummy image, and the projector takes part."""
    model = tiny_model().train()
    ids, labels = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[-100, 2, 3, 4]])
    calls = []
    model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids, labels=labels).loss.backward()
    assert calls == [1]
    with_dummy = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    assert model.get_model().mm_projector.summary.former.weight.grad is not None
    model.zero_grad()
    model.eval()(input_ids=ids, labels=labels).loss.backward()
    torch.testing.assert_close(with_dummy, model.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-12, atol=1e-14)


def test_a_text_only_batch_in_float16_is_finite():
    """The black image's features may sum to more than float16 holds."""
    model = tiny_model().half().train()
    with torch.no_grad():
        model.get_model().mm_projector.get_submodule("2").bias.fill_(500.0)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_roles_of_the_latest_training_batch():
    model = tiny_model().train()
    ids, mask, labels, images = ragged_batch()
    model(input_ids=ids, attention_mask=mask, labels=labels, images=tiny_images(images))
    roles = model.last_roles
    assert roles.shape == (3, 6 + 2 * 11)
    assert int((roles == TokenRole.TEXT).sum()) == int(mask.sum()) - images
    assert int(is_visual(roles).sum()) == images * 11
