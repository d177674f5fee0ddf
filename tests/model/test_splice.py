"""Where each image lands in its prompt, what is cut, and what is said."""

from __future__ import annotations

import logging

import pytest
import torch

from llava_sv.model.splice import labels_after_cut, splice
from llava_sv.model.token_groups import TokenGroups

IMAGE = -200


def group(length: int, value: float, role: int = 3) -> TokenGroups:
    return TokenGroups(torch.full((length, 2), value), torch.full((length,), role, dtype=torch.int8))


def embed(ids: torch.Tensor) -> torch.Tensor:
    return ids.float().unsqueeze(-1).expand(-1, 2) / 100


def run(ids, groups, **options):
    return splice(torch.tensor(ids), groups, embed, **options)


def test_images_land_in_order_with_text_on_both_sides():
    batch = run([[1, IMAGE, 2, IMAGE, 3]], [group(2, 7.0), group(1, 8.0, role=5)])
    expected = torch.tensor([0.01, 7.0, 7.0, 0.02, 8.0, 0.03])
    torch.testing.assert_close(batch.inputs_embeds[0, :, 0], expected)
    assert batch.token_roles.tolist() == [[1, 3, 3, 1, 5, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.labels is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_samples_are_padded_on_the_asked_side(side):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    labels = torch.tensor([[-100, -100, 9], [-100, 4, -100]])
    batch = run([[1, IMAGE, 9], [3, 4, 0]], [group(3, 7.0)], attention_mask=mask, labels=labels, padding_side=side)
    if side == "right":
        assert batch.token_roles.tolist() == [[1, 3, 3, 3, 1], [1, 1, 0, 0, 0]]
        assert batch.labels.tolist() == [[-100] * 4 + [9], [-100, 4, -100, -100, -100]]
    else:
        assert batch.token_roles.tolist() == [[1, 3, 3, 3, 1], [0, 0, 0, 1, 1]]
        assert batch.labels.tolist() == [[-100] * 4 + [9], [-100, -100, -100, -100, 4]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert torch.equal(batch.attention_mask, batch.token_roles > 0)
    assert not batch.inputs_embeds[~batch.attention_mask].any()


@pytest.mark.parametrize(
    ("max_length", "roles"),
    [
        (7, [1, 1, 3, 3, 3, 1, 1]),
        (6, [1, 1, 3, 3, 3, 1]),
        (5, [1, 1, 3, 3, 3]),
        (4, [1, 1]),
        (3, [1, 1]),
        (1, [1]),
    ],
)
def test_a_cut_never_falls_inside_an_image(max_length, roles):
    labels = torch.tensor([[-100, -100, -100, 8, 9]])
    batch = run([[1, 2, IMAGE, 8, 9]], [group(3, 7.0)], labels=labels, max_length=max_length)
    assert batch.token_roles.tolist() == [roles]


def test_what_follows_an_image_that_did_not_fit_goes_too():
    batch = run([[1, IMAGE, 2, IMAGE, 3]], [group(4, 7.0), group(1, 8.0)], max_length=4)
    assert batch.token_roles.tolist() == [[1]]


@pytest.mark.parametrize("max_length", [None, 1, 2, 4, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_after_the_cut_are_those_that_splice_keeps(max_length, side):
    ids = torch.tensor([[1, IMAGE, 2, 3, IMAGE, 4], [5, 6, 7, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    if side == "left":
        ids[1], mask[1] = ids[1].flip(0), mask[1].flip(0)
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    groups = [group(2, 7.0), group(3, 8.0)]
    left = labels_after_cut(ids, labels, mask, [2, 3], max_length)
    batch = splice(ids, groups, embed, attention_mask=mask, labels=labels, max_length=max_length)
    for row in range(2):
        assert left[row][left[row] != -100].tolist() == batch.labels[row][batch.labels[row] != -100].tolist()


def test_a_lost_answer_is_said(caplog):
    labels = torch.tensor([[-100, -100, -100, 9], [-100, 5, 6, 7]])
    with caplog.at_level(logging.WARNING):
        run([[1, 2, IMAGE, 9], [4, 5, 6, 7]], [group(3, 7.0)], labels=labels, max_length=5)
    assert "1 sample(s) of this batch (at [0]) lost their whole answer when cut to 5 tokens" in caplog.text


def test_a_cut_that_leaves_answers_is_quiet(caplog):
    labels = torch.tensor([[-100, -100, 8, 9]])
    run([[1, IMAGE, 8, 9]], [group(3, 7.0)], labels=labels, max_length=5)
    assert not caplog.records


@pytest.mark.parametrize(("ids", "images"), [([[1, IMAGE, 2]], 0), ([[1, IMAGE, 2]], 2), ([[1, 2]], 1)])
def test_marks_and_images_must_agree(ids, images):
    marks = sum(i == IMAGE for i in ids[0])
    with pytest.raises(ValueError, match=rf"{marks} <image> mark\(s\), but {images} image\(s\)"):
        run(ids, [group(2, 7.0)] * images)


def test_a_mark_in_the_padding_is_no_image():
    batch = run([[1, 2, IMAGE]], [], attention_mask=torch.tensor([[1, 1, 0]]))
    assert batch.token_roles.tolist() == [[1, 1]]


def test_gradients_reach_text_and_image_tokens():
    weights = torch.ones(5, 2, requires_grad=True)
    image = TokenGroups(torch.ones(3, 2, requires_grad=True), torch.full((3,), 3, dtype=torch.int8))
    ids = torch.tensor([[1, IMAGE, 2]])
    batch = splice(ids, [image], lambda i: weights[i])
    (batch.inputs_embeds * torch.arange(1.0, 6.0)[None, :, None]).sum().backward()
    assert weights.grad[:, 0].tolist() == [0, 1, 5, 0, 0]
    assert image.tokens.grad[:, 0].tolist() == [2, 3, 4]
