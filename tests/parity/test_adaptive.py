"""`num_retained: auto` against plain loops: counts, groups, forward and backward, decoding, batch against single."""

from __future__ import annotations

import math

import pytest
import torch

from llava_sv.errors import UserError
from llava_sv.model.compression.adaptive import choose_counts, find_threshold, raster_split
from llava_sv.model.compression.merge import merge_tokens
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava_sv.model.token_groups import KV_LEVELS, TokenRole
from tests.parity.oracle import (
    check_against_masked_loop,
    greedy_recompute,
    merge_by_loops,
    single_samples,
    summary_by_loop,
)
from tests.parity.tiny import family_images, family_model, ragged_batch, tiny_images, tiny_model

AUTO = {
    "num_retained": "auto",
    "num_skipped": 5,
    "retained_mean": 5,
    "retained_min": 2,
    "retained_max": 9,
    "retained_threshold": 0.62,
}
OF_FAMILY = {"llava": AUTO, "llava_hd": {**AUTO, "num_skipped": 7}}
SWITCHES = {
    "default": {},
    "attention": {"selection": "cls_attention"},
    "last visual token": {"last_visual_ffn": True},
    "some layers": {"skip_layers": [0, 2]},
    "no merge": {"merge": False},
    "no former summary": {"former_summary": False},
    "no latter summary": {"latter_summary": False},
    "no summaries": {"former_summary": False, "latter_summary": False},
    "summary norm": {"summary_norm": "layernorm"},
    "skipping off": {"skip_ffn": False},
}


def count_by_loop(scores: list[float], threshold: float, least: int, most: int) -> int:
    """The fewest patches, best first, whose shares add up to the threshold, within the bounds."""
    mean = sum(scores) / len(scores)
    spread = max(math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)), 1e-6)
    weights = [math.exp((s - mean) / spread) for s in scores]
    held, count = 0.0, 0
    for weight in sorted(weights, reverse=True):
        if held >= threshold:
            break
        held += weight / sum(weights)
        count += 1
    return min(max(count, least), most)


def auto_model(family="llava", **switches):
    return family_model(family, {**OF_FAMILY[family], **switches})


def scores_of(model, image):
    """Of the one view of `image`, by the definition of its selection."""
    features = model.get_vision_tower()(image.unsqueeze(0), with_cls_attention=True)
    if model.config.skip_vision.selection == "cls_attention":
        return features.cls_attention[0].tolist()
    return [float(torch.cosine_similarity(patch, features.cls[0], dim=0)) for patch in features.patches[0]]


def test_counts_equal_the_loop_and_keep_the_bounds():
    scores = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) ** 3
    skip = SkipVisionConfig(**AUTO)
    counts = choose_counts(scores, skip).tolist()
    assert counts == [count_by_loop(row, 0.62, 2, 9) for row in scores.double().tolist()]
    assert {min(counts), max(counts)} <= set(range(2, 10))
    assert len(set(counts)) > 3


def test_few_patches_that_stand_out_need_fewer_than_many_alike():
    alike = torch.linspace(0, 1, 30)
    outstanding = torch.zeros(30)
    outstanding[4] = 1.0
    skip = SkipVisionConfig(num_retained="auto", retained_mean=10, retained_threshold=0.5, retained_min=1)
    few, many, flat = choose_counts(torch.stack([outstanding, alike, torch.full((30,), 0.3)]), skip).tolist()
    assert few == 1
    assert few < many < flat == 15


def test_a_scale_and_an_offset_of_the_scores_change_nothing():
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    skip = SkipVisionConfig(**AUTO)
    assert torch.equal(choose_counts(scores, skip), choose_counts(scores * 0.07 + 3, skip))


def test_split_lists_the_best_then_the_rest_in_raster_order():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.5], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert raster_split(scores, torch.tensor([3, 1])).tolist() == [[1, 2, 3, 0, 4], [0, 1, 2, 3, 4]]


def test_the_threshold_meets_the_average():
    scores = torch.randn(200, 64, generator=torch.Generator().manual_seed(2)).exp()
    for mean in (4, 16, 30):
        skip = SkipVisionConfig(num_retained="auto", retained_mean=mean, retained_max=45, retained_min=2)
        threshold, counts = find_threshold(scores, skip)
        skip.retained_threshold = threshold
        assert torch.equal(choose_counts(scores, skip), counts)
        assert abs(float(counts.double().mean()) - mean) <= 1 / len(scores) + 1e-9


def test_merge_of_unequal_budgets_equals_loops():
    tokens = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    merged, there = merge_tokens(tokens, 6, mask, torch.tensor([6, 3, 1]))
    for group, kept in enumerate((6, 3, 1)):
        expected = merge_by_loops(tokens[group][mask[group]], kept)
        torch.testing.assert_close(merged[group][there[group]], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", SWITCHES)
def test_groups_equal_the_method_by_hand(variant):
    """Count, select, project, merge, summarise, one image at a time with loops."""
    model = auto_model(**SWITCHES[variant])
    skip, projector = model.config.skip_vision, model.get_model().mm_projector
    images = tiny_images(8)
    with torch.no_grad():
        groups = model.encode_images(images)
        seen = set()
        for image, group in zip(images, groups):
            scores = scores_of(model, image)
            count = count_by_loop(scores, 0.62, 2, 9)
            seen.add(count)
            best = sorted(sorted(range(16), key=lambda i: -scores[i])[:count])
            rest = [i for i in range(16) if i not in best]
            projected = projector.project(model.get_vision_tower()(image.unsqueeze(0)).patches)[0]
            retained = projected[best]
            skipped = merge_by_loops(projected[rest], 10 - count) if skip.merge else projected[rest]
            rows, roles = [*retained], [TokenRole.RETAINED] * count
            if skip.former_summary:
                rows.append(pooled(projector.summary.former, retained))
                roles.append(TokenRole.SUMMARY)
            rows += [*skipped]
            roles += [TokenRole.SKIPPED] * len(skipped)
            if skip.last_visual_ffn:
                roles[-1] = TokenRole.RETAINED
            if skip.latter_summary:
                rows.append(pooled(projector.summary.latter, skipped))
                roles.append(TokenRole.SUMMARY)
            assert group.roles.tolist() == roles
            torch.testing.assert_close(group.tokens, torch.stack(rows), rtol=1e-7, atol=1e-9)
            assert len(group) == model.config.visual_tokens_per_image()
    assert len(seen) > 2


def pooled(summary, tokens):
    scored = tokens if summary.norm is None else summary.norm(tokens)
    if summary.norm is None:
        return summary_by_loop(tokens, summary.weight)
    return sum(share * token for share, token in zip((scored @ summary.weight).softmax(0), tokens))


@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("variant", SWITCHES)
def test_logits_and_gradients_equal_the_masked_loop(family, variant):
    model = auto_model(family, **SWITCHES[variant])
    ids, mask, labels, count = ragged_batch()
    check_against_masked_loop(model, ids, mask, labels, family_images(family, count))
    model.zero_grad()
    check_against_masked_loop(model.train(), ids, mask, labels, family_images(family, count))


@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("level", ["none", "skipped"])
def test_cached_decoding_of_a_batch_equals_recomputation_of_each(family, level):
    model = auto_model(family)
    ids, mask, _, count = ragged_batch()
    images = family_images(family, count)
    together = model.generate(ids, attention_mask=mask, images=images, skip_kv=level, max_new_tokens=6, do_sample=False)
    for row, (own, pixels) in enumerate(single_samples(ids, mask, images)):
        batch = model.prepare_inputs_labels_for_multimodal(own, images=pixels)
        expected = greedy_recompute(model, batch.inputs_embeds[0], batch.token_roles[0], KV_LEVELS[level], 6)
        assert together[row].tolist() == expected


@pytest.mark.parametrize("family", OF_FAMILY)
def test_an_image_s_tokens_do_not_depend_on_the_others(family):
    model = auto_model(family)
    images = family_images(family, 6)
    with torch.no_grad():
        for image, group in zip(images, model.encode_images(images)):
            alone = model.encode_images([image])[0]
            assert torch.equal(alone.roles, group.roles)
            torch.testing.assert_close(alone.tokens, group.tokens, rtol=1e-9, atol=1e-11)


def test_hd_s_counts_follow_the_overview_and_the_length_does_not():
    model = auto_model("llava_hd")
    images = list(tiny_images(20).split(5))
    with torch.no_grad():
        groups = model.encode_images(images)
        for image, group in zip(images, groups):
            count = count_by_loop(scores_of(model, image[0]), 0.62, 2, 9)
            assert int((group.roles == TokenRole.RETAINED).sum()) == count
            assert len(group) == 5 + 7 + 2
        whole = model.encode_images([images[0][:1]])[0]
    assert len({int((group.roles == TokenRole.RETAINED).sum()) for group in groups}) > 1
    assert whole.roles.tolist() == [TokenRole.RETAINED] * 16 + [TokenRole.SUMMARY]


@pytest.mark.parametrize("max_length", [18, 22])
def test_what_the_cut_leaves_is_known_beforehand(max_length):
    model = auto_model()
    model.config.tokenizer_model_max_length = max_length
    ids, mask, labels, count = ragged_batch()
    known = model.surviving_labels(ids, labels, mask)
    batch = model.prepare_inputs_labels_for_multimodal(ids, mask, labels, tiny_images(count))
    for row in range(len(ids)):
        kept = batch.labels[row][batch.labels[row] != -100]
        assert kept.tolist() == known[row][known[row] != -100].tolist()
    assert int((known != -100).sum()) < int((labels != -100).sum())


def test_packs_are_as_long_as_planned():
    model = auto_model()
    ids, mask, labels, count = ragged_batch()
    batch = model.prepare_inputs_labels_for_multimodal(ids, mask, labels, tiny_images(count), packs=[2, 1])
    each = model.config.visual_tokens_per_image()
    assert batch.sample_lengths == [[8 + each, 6 + 2 * each], [9]]


def test_it_is_saved_and_loaded(tmp_path):
    model = auto_model()
    model.save_pretrained(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.skip_vision == model.config.skip_vision
    with torch.no_grad():
        for own, other in zip(model.encode_images(tiny_images(4)), again.encode_images(tiny_images(4))):
            assert torch.equal(own.roles, other.roles)
            assert torch.equal(own.tokens, other.tokens)


def test_a_fixed_count_within_auto_is_the_fixed_budget():
    """Bounds that leave no choice give what that number gives, tokens and all."""
    fixed = tiny_model({"num_retained": 5, "num_skipped": 5})
    bound = tiny_model({**AUTO, "retained_min": 5, "retained_max": 5})
    with torch.no_grad():
        for own, other in zip(fixed.encode_images(tiny_images(4)), bound.encode_images(tiny_images(4))):
            assert torch.equal(own.roles, other.roles)
            torch.testing.assert_close(own.tokens, other.tokens, rtol=1e-12, atol=1e-13)


def test_without_a_threshold_the_model_says_where_it_comes_from():
    model = auto_model(retained_threshold=None)
    with pytest.raises(UserError, match="retained_threshold is not set: training finds it on its images"):
        model.encode_images(tiny_images(1))
