"""Every family against the plain oracles: forward, backward, cached decoding, batch against single, save and load."""

from __future__ import annotations

import pytest
import torch

from llava_sv.errors import UserError
from llava_sv.mm_utils import VIEWS
from llava_sv.model import token_counts
from llava_sv.model.builders import BUILDERS
from llava_sv.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava_sv.model.multimodal_projector.families import GROUPINGS
from llava_sv.model.token_groups import KV_LEVELS, TokenRole
from llava_sv.train.preflight import SCRIPTS
from tests.parity.oracle import (
    check_against_masked_loop,
    greedy_recompute,
    merge_by_loops,
    single_samples,
    summary_by_loop,
)
from tests.parity.tiny import FAMILIES, family_images, family_model, ragged_batch

SWITCHES = {
    "default": {},
    "last visual token": {"last_visual_ffn": True},
    "some layers": {"skip_layers": [0, 2]},
    "no merge": {"merge": False},
    "no former summary": {"former_summary": False},
    "no latter summary": {"latter_summary": False},
    "summary norm": {"summary_norm": "layernorm"},
    "fewer retained": {"num_retained": 3},
    "skipping off": {"skip_ffn": False},
}
STEPS = 6


def levels_of(family: str) -> list[str]:
    return [level for level in KV_LEVELS if family == "cos" or level != "fine+skipped"]


def test_every_family_is_here():
    """In every table that docs/Extending.md asks a new family to be put in."""
    for table in (FAMILIES, GROUPINGS, token_counts.FAMILIES, VIEWS, SCRIPTS):
        assert list(table) == list(BUILDERS)


def unfreeze(model):
    """The encoder's used weights train too, as CoS does at SFT."""
    for parameter, _ in model.get_vision_tower().used_parameters().values():
        parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("variant", SWITCHES)
def test_logits_and_gradients_equal_the_masked_loop(family, variant):
    model = unfreeze(family_model(family, SWITCHES[variant]))
    ids, mask, labels, count = ragged_batch()
    check_against_masked_loop(model, ids, mask, labels, family_images(family, count))


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("switches", ["default", "last visual token", "no merge", "fewer retained", "skipping off"])
def test_cached_decoding_equals_recomputation(family, switches):
    model = family_model(family, SWITCHES[switches])
    ids, mask, _, count = ragged_batch()
    images = family_images(family, count)
    for level in levels_of(family):
        options = dict(skip_kv=level, max_new_tokens=STEPS, do_sample=False)
        together = model.generate(ids, attention_mask=mask, images=images, **options)
        for row, (own, pixels) in enumerate(single_samples(ids, mask, images)):
            batch = model.prepare_inputs_labels_for_multimodal(own, images=pixels)
            expected = greedy_recompute(model, batch.inputs_embeds[0], batch.token_roles[0], KV_LEVELS[level], STEPS)
            assert together[row].tolist() == expected, (level, row)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("dense", [False, True])
def test_batch_equals_single(family, dense):
    """Logits of every step: left padding, unequal images and tiles, a ragged re-packed cache."""
    model = family_model(family, dense=dense)
    ids, mask, _, count = ragged_batch()
    images = family_images(family, count)
    options = dict(max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    together = model.generate(ids, attention_mask=mask, images=images, **options)
    for row, (own, pixels) in enumerate(single_samples(ids, mask, images)):
        alone = model.generate(own, images=pixels if len(pixels) else None, **options)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()
        for step in range(STEPS):
            torch.testing.assert_close(together.logits[step][row], alone.logits[step][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("dense", [False, True])
def test_saved_and_loaded_gives_the_same_logits(family, dense, tmp_path):
    model = family_model(family, dense=dense)
    model.save_pretrained(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path).double().eval()
    for name in ("mm_family", "skip_vision", *FAMILIES[family][1]):
        assert getattr(again.config, name) == getattr(model.config, name)
    ids, mask, _, count = ragged_batch()
    images = family_images(family, count)
    with torch.no_grad():
        first, second = (m(input_ids=ids, attention_mask=mask, images=images).logits for m in (model, again))
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("family", BUILDERS)
def test_every_weight_is_used_whatever_the_batch_holds(family):
    """A batch without images, and one whose images have no tiles: the same parameters get a gradient."""
    ids, mask, labels, _ = ragged_batch(((3, 0, 5), (2, 0, 4)))
    marked, marked_mask, marked_labels, count = ragged_batch(((3, 1, 5), (2, 1, 4)))
    got = []
    for views in (None, 1, 5):
        model = unfreeze(family_model(family)).train()
        if views is None:
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        else:
            images = [image[:1].expand(views, -1, -1, -1) if family == "llava_hd" else image
                      for image in family_images(family, count)]  # fmt: skip
            model(input_ids=marked, attention_mask=marked_mask, labels=marked_labels, images=images).loss.backward()
        got.append({name for name, p in model.named_parameters() if p.grad is not None})
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert got[0] == got[1] == got[2]
    assert "model.mm_projector.summary.latter.weight" in got[0]


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("switches", SWITCHES)
def test_tokens_by_hand(family, switches):
    """Retain, merge, summarise and order, one image at a time with loops, from the projected tokens."""
    model = family_model(family, SWITCHES[switches])
    skip, projector = model.config.skip_vision, model.get_model().mm_projector
    images = family_images(family, 4)
    with torch.no_grad():
        groups = model.encode_images(images)
        for image, group in zip(images, groups):
            features = model.get_vision_tower()(image if image.dim() == 4 else image.unsqueeze(0))
            tokens = projector.tokens_of(features)
            if family == "cos":
                retained, rest = tokens[0, : skip.num_retained], tokens[0, skip.num_retained :]
            else:
                scores = [float(torch.cosine_similarity(p, features.cls[0], dim=0)) for p in features.patches[0]]
                best = sorted(sorted(range(16), key=lambda i: -scores[i])[: skip.num_retained])
                others = [i for i in range(16) if i not in best]
                retained, rest = tokens[0, best], torch.cat([tokens[0, others], tokens[1:].flatten(0, 1)])
                if family == "llava_hd" and len(tokens) == 1:
                    retained, rest = tokens[0], tokens[0, :0]
            coarse = 4 if family == "cos" else len(retained)
            parts, roles = [retained], [3] * min(coarse, len(retained)) + [4] * (len(retained) - coarse)
            if skip.former_summary:
                parts.append(summary_as_told(retained, projector.summary.former))
                roles.append(2)
            if len(rest):
                skipped = merge_by_loops(rest, skip.num_skipped) if skip.merge else rest
                parts.append(skipped)
                roles += [5] * len(skipped)
                if skip.last_visual_ffn:
                    roles[-1] = 3
                if skip.latter_summary:
                    parts.append(summary_as_told(skipped, projector.summary.latter))
                    roles.append(2)
            torch.testing.assert_close(group.tokens, torch.cat(parts), rtol=1e-7, atol=1e-9)
            assert group.roles.tolist() == roles


def summary_as_told(tokens, token):
    """[1, C]: equation 6 by a loop, or with a LayerNorm before the scores."""
    if token.norm is None:
        return summary_by_loop(tokens, token.weight)[None]
    scores = (token.norm(tokens) @ token.weight).softmax(0)
    return sum(score * row for score, row in zip(scores, tokens))[None]


@pytest.mark.parametrize("family", ["llava", "llava_hd"])
def test_a_family_without_a_middle_scale_has_no_fine_level(family):
    model = family_model(family)
    ids, mask, _, count = ragged_batch()
    with pytest.raises(UserError, match=rf"family '{family}' has none; use 'skipped' or 'none'"):
        model.generate(ids, attention_mask=mask, images=family_images(family, count), skip_kv="fine+skipped")


def test_the_fine_level_drops_the_middle_scale():
    """CoS: only the coarsest scale and the summaries stay of an image."""
    model = family_model("cos")
    ids, _, _, count = ragged_batch(((3, 1, 5),))
    options = dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    images = family_images("cos", count)
    lengths = [
        model.generate(ids, images=images, skip_kv=level, **options).past_key_values.get_seq_length()
        for level in ("none", "skipped", "fine+skipped")
    ]
    text = 8 + 1  # and one decoded key
    assert lengths == [text + 20 + 1 + 6 + 1, text + 20 + 2, text + 4 + 2]
    roles = model.encode_images(images)[0].roles
    assert int((roles == TokenRole.FINE).sum()) == 16


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"hd_max_tiles": 3}, "hd_max_tiles 3 allows 3"), ({"hd_fixed_grid": "1x2"}, "hd_fixed_grid 1x2 allows 2")],
)
def test_too_many_tiles_name_the_setting_that_decides(settings, said):
    model = family_model("llava_hd", **settings)
    with pytest.raises(ValueError, match=f"image 0 comes in 4 tiles, but {said}"):
        model.encode_images(family_images("llava_hd", 1))
