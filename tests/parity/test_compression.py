"""Selection, merge and summaries against plain loops (the paper's sections 4.1 and 4.2)."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_sv.model.compression.merge import apply_merge, merge_tokens, plan_merge
from llava_sv.model.compression.select import VisionFeatures, cls_similarity, split_by_score
from llava_sv.model.compression.summary import SummaryToken
from llava_sv.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava_sv.model.token_groups import TokenRole
from tests.parity.oracle import merge_by_loops, summary_by_loop
from tests.parity.tiny import SKIP, tiny_images, tiny_model


@pytest.mark.parametrize(("count", "kept"), [(12, 5), (5, 5), (3, 5), (30, 1)])
def test_merge_equals_loops(count, kept):
    tokens = torch.randn(4, count, 16, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    merged, mask = merge_tokens(tokens, kept)
    for group in range(4):
        expected = merge_by_loops(tokens[group], kept)
        assert int(mask[group].sum()) == len(expected)
        torch.testing.assert_close(merged[group][mask[group]], expected, rtol=1e-12, atol=1e-12)


def test_merge_of_ragged_groups_equals_loops_on_each():
    tokens = torch.randn(4, 10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[0, :10] = mask[1, :7] = mask[2, ::3] = True
    mask[3, 9] = True
    merged, kept_mask = merge_tokens(tokens, 4, mask)
    for group in range(4):
        expected = merge_by_loops(tokens[group][mask[group]], 4)
        torch.testing.assert_close(merged[group][kept_mask[group]], expected, rtol=1e-12, atol=1e-12)
        assert not merged[group][~kept_mask[group]].any()


@pytest.mark.parametrize("ragged", [False, True])
def test_merge_of_an_image_s_worth_decides_as_all_pairs_do(ragged):
    """476 tokens in float32 against the whole map of similarities in float64: who stays, and who joins whom."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(2, 476, 64, generator=generator) + torch.randn(2, 1, 64, generator=generator)
    mask = torch.ones(2, 476, dtype=torch.bool)
    if ragged:
        mask[0, 400:] = mask[1, ::5] = False
    plan = plan_merge(tokens, 156, mask if ragged else None)
    for group in range(2):
        real = mask[group].nonzero().flatten()
        unit = torch.nn.functional.normalize(tokens[group, real].double(), dim=-1)
        similarity = unit @ unit.T
        stay = ((similarity.sum(1) - 1).argsort()[:156]).sort().values
        assert torch.equal(plan.kept[group], real[stay])
        joins = similarity[:, stay].argmax(1)
        joins[stay] = torch.arange(156)
        assert torch.equal(plan.target[group, real], joins)
        assert (plan.target[group, ~mask[group]] == 156).all()


def test_of_kept_twins_the_earlier_is_joined_whatever_rounding_says():
    """Two tiles of one colour hold the same tokens: what is like both goes to the first."""
    generator = torch.Generator().manual_seed(0)
    joined = 0
    for _ in range(60):
        half, width = (int(torch.randint(8, 150, (1,), generator=generator)) for _ in range(2))
        kept = int(torch.randint(2, half, (1,), generator=generator))
        tile = torch.randn(half, 8 * (width // 8 + 1), generator=generator)
        tokens = torch.cat([tile, tile]).unsqueeze(0)
        plan = plan_merge(tokens, kept)
        place = {index: slot for slot, index in enumerate(plan.kept[0].tolist())}
        for index, slot in enumerate(plan.target[0].tolist()):
            if index not in place:
                joined += 1
                target = int(plan.kept[0, slot])
                assert target < half or target - half not in place
    assert joined > 2000


def test_each_group_keeps_as_many_as_it_is_told():
    tokens = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[2, 6:] = False
    for given in (None, mask):
        merged, kept_mask = merge_tokens(tokens, 7, given, torch.tensor([7, 4, 5]))
        assert kept_mask.sum(1).tolist() == [7, 4, 5]
        for group, kept in enumerate((7, 4, 5)):
            real = slice(None) if given is None else given[group]
            expected = merge_by_loops(tokens[group][real], kept)
            torch.testing.assert_close(merged[group, :kept], expected, rtol=1e-12, atol=1e-12)
            assert not merged[group, kept:].any()


def test_merge_makes_no_map_of_all_pairs():
    """Its cost is that of n x k similarities, and none of n x n."""
    with FlopCounterMode(display=False) as counter:
        merge_tokens(torch.randn(2, 96, 32), 24)
    assert counter.get_total_flops() == 2 * 2 * 96 * (24 + 1) * 32


def test_merge_conserves_every_token_once():
    tokens = torch.randn(2, 20, 8, dtype=torch.float64)
    plan = plan_merge(tokens, 6)
    counts = torch.stack([torch.bincount(row, minlength=6) for row in plan.target])
    assert counts.sum(1).tolist() == [20, 20]
    assert (counts > 0).all()
    weighted = (apply_merge(tokens, plan) * counts.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(weighted, tokens.sum(1), rtol=1e-12, atol=1e-12)


def test_twins_stay_with_themselves():
    """Two equal tokens that are both kept each keep their own slot."""
    tokens = torch.tensor([[[1.0, 0.0], [-1.0, 0.1], [-1.0, 0.1], [1.0, 0.01], [1.0, -0.01]]], dtype=torch.float64)
    plan = plan_merge(tokens, 2)
    assert plan.kept.tolist() == [[1, 2]]
    assert plan.target[0, 1] == 0
    assert plan.target[0, 2] == 1


def test_merge_gradient_is_the_mean_s():
    tokens = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    plan = plan_merge(tokens, 3)
    apply_merge(tokens, plan).sum().backward()
    counts = torch.bincount(plan.target[0], minlength=3)
    torch.testing.assert_close(tokens.grad[0, :, 0], 1.0 / counts[plan.target[0]].double())


def test_bf16_means_are_summed_in_float32():
    tokens = torch.cat([torch.full((1, 600, 2), 1.0), torch.tensor([[[-1.0, 1.0]]])], dim=1).to(torch.bfloat16)
    tokens[0, :600] += torch.tensor([0.0, 0.5], dtype=torch.bfloat16)
    merged, _ = merge_tokens(tokens, 2)
    torch.testing.assert_close(merged[0, 0].float(), torch.tensor([1.0, 1.5]))


@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_summary_equals_the_loop(norm):
    torch.manual_seed(0)
    summary = SummaryToken(16, norm).double()
    tokens = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(summary(tokens), tokens.mean(1), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        summary.weight.normal_()
    for group in range(3):
        scored = tokens[group] if norm == "none" else summary.norm(tokens[group])
        shares = torch.stack([(row @ summary.weight).exp() for row in scored])
        expected = sum(share * token for share, token in zip(shares / shares.sum(), tokens[group]))
        torch.testing.assert_close(summary(tokens)[group], expected, rtol=1e-10, atol=1e-12)
        if norm == "none":
            torch.testing.assert_close(expected, summary_by_loop(tokens[group], summary.weight.detach()))


def test_summary_leaves_padding_out():
    torch.manual_seed(0)
    summary = SummaryToken(8).double()
    with torch.no_grad():
        summary.weight.normal_()
    tokens = torch.randn(1, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False]])
    torch.testing.assert_close(summary(tokens, mask), summary(tokens[:, mask[0]]), rtol=1e-12, atol=1e-12)


def test_autocast_changes_neither_the_merge_nor_the_summary():
    """Training in mixed precision merges as inference does: similarities and pooling stay float32."""
    tokens = torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(0))
    summary = SummaryToken(32)
    with torch.no_grad():
        summary.weight.normal_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plan, pooled = plan_merge(tokens, 60), summary(tokens)
        assert torch.equal(plan.target, plan_merge(tokens, 60).target)
        assert torch.equal(pooled, summary(tokens))


def test_a_bf16_mean_over_many_tokens_is_the_mean():
    tokens = torch.ones(1, 476, 4, dtype=torch.bfloat16)
    assert torch.equal(SummaryToken(4).bfloat16()(tokens), torch.ones(1, 4, dtype=torch.bfloat16))


def test_summary_gradients():
    """Of the tokens and of the weight, against finite differences."""
    torch.manual_seed(0)
    summary = SummaryToken(6, "layernorm").double()
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def pooled(tokens, weight):
        return torch.func.functional_call(summary, {"weight": weight}, (tokens,))

    assert torch.autograd.gradcheck(pooled, (tokens, weight))


def test_selection_keeps_raster_order_and_the_earlier_of_ties():
    keep, rest = split_by_score(torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.5]]), 3)
    assert keep.tolist() == [[1, 2, 3]]
    assert rest.tolist() == [[0, 4]]


def test_cls_similarity_is_the_cosine():
    patches, cls = torch.randn(2, 5, 8), torch.randn(2, 8)
    scores = cls_similarity(VisionFeatures(patches, cls))
    for view in range(2):
        for patch in range(5):
            a, b = patches[view, patch], cls[view]
            assert scores[view, patch].item() == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-5)


@pytest.mark.parametrize("layer", [-2, -1, 2])
def test_encoder_equals_transformers_clip(layer):
    """The selected hidden state, the CLS row and its attention, as transformers' CLIP gives them with full maps."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8
    )
    config._attn_implementation = "eager"
    clip = CLIPVisionModel(config).double().eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pixels = tiny_images(2)
    features = CLIPVisionTower(clip, select_layer=layer)(pixels, with_cls_attention=True)
    expected = clip(pixels, output_hidden_states=True, output_attentions=True)
    state = expected.hidden_states[layer]
    torch.testing.assert_close(features.patches, state[:, 1:], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(features.cls, state[:, 0], rtol=1e-6, atol=1e-8)
    # hidden state 0 is the embedding: state i is the output of block i - 1
    block = layer - 1 if layer >= 0 else len(expected.attentions) + layer
    full = expected.attentions[block]
    torch.testing.assert_close(features.cls_attention, full[:, :, 0, 1:].sum(1), rtol=1e-5, atol=1e-7)


def test_cls_patch_keeps_the_cls_token():
    model = tiny_model(None, mm_vision_select_feature="cls_patch")
    assert model.config.visual_tokens_per_image() == 17
    groups = model.encode_images(tiny_images(1))
    assert len(groups[0]) == 17


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, [3] * 4 + [2] + [5] * 5 + [2]),
        ({"former_summary": False, "latter_summary": False}, [3] * 4 + [5] * 5),
        ({"latter_summary": False}, [3] * 4 + [2] + [5] * 5),
        ({"last_visual_ffn": True}, [3] * 4 + [2] + [5] * 4 + [3] + [2]),
        ({"merge": False, "num_skipped": None}, [3] * 4 + [2] + [5] * 12 + [2]),
    ],
)
def test_order_of_equation_6(switches, expected):
    model = tiny_model({**SKIP, **switches})
    with torch.no_grad():
        group = model.encode_images(tiny_images(2))[1]
    assert group.roles.tolist() == expected
    assert model.config.visual_tokens_per_image() == len(expected)


@pytest.mark.parametrize("selection", ["cls_similarity", "cls_attention"])
def test_groups_equal_the_method_by_hand(selection):
    """Select, project, merge, summarise, one image at a time with loops."""
    model = tiny_model({**SKIP, "selection": selection})
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    images = tiny_images(3)
    with torch.no_grad():
        groups = model.encode_images(images)
        for image, group in zip(images, groups):
            features = tower(image.unsqueeze(0), with_cls_attention=True)
            if selection == "cls_similarity":
                scores = [float(torch.cosine_similarity(p, features.cls[0], dim=0)) for p in features.patches[0]]
            else:
                scores = features.cls_attention[0].tolist()
            best = sorted(sorted(range(16), key=lambda i: -scores[i])[:4])
            rest = [i for i in range(16) if i not in best]
            projected = projector.project(features.patches)[0]
            retained, skipped = projected[best], merge_by_loops(projected[rest], 5)
            former = summary_by_loop(retained, projector.summary.former.weight)
            latter = summary_by_loop(skipped, projector.summary.latter.weight)
            expected = torch.cat([retained, former[None], skipped, latter[None]])
            torch.testing.assert_close(group.tokens, expected, rtol=1e-7, atol=1e-9)
            assert group.roles[5] == TokenRole.SKIPPED
