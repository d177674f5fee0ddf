"""Encoders without a CLS token, and selections that need none: SigLIP against transformers' own, loops for scores."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig, SiglipVisionModel

from llava_sv.model.compression.select import (
    NEEDS,
    SELECTORS,
    VisionFeatures,
    distinctiveness,
    get_selector,
    split_by_score,
    wants_of,
)
from llava_sv.model.multimodal_encoder.builder import VISION_TOWERS
from llava_sv.model.multimodal_encoder.pretrained import at_image_size
from llava_sv.model.multimodal_encoder.siglip_encoder import SiglipVisionTower
from tests.parity.largest import LargestTensor
from tests.parity.oracle import merge_by_loops, summary_by_loop
from tests.parity.tiny import SKIP, ragged_batch, tiny_images, tiny_model

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8
)


def tiny_siglip(**changes) -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(**{**SIZES, **changes})
    config._attn_implementation = "sdpa"
    model = SiglipVisionModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def siglip_model(skip: dict | None = None, decoder: str = "llama", **overrides):
    vision = SiglipVisionConfig(**SIZES).to_dict()
    return tiny_model(skip, decoder=decoder, vision_config=vision, **overrides)


@pytest.mark.parametrize("layer", [-2, -1, 1, 4])
def test_features_equal_transformers_hidden_states(layer):
    model, pixels = tiny_siglip(), tiny_images(2)
    features = SiglipVisionTower(model, select_layer=layer)(pixels)
    states = model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features.patches, states[layer], rtol=1e-12, atol=1e-12)
    assert features.patches.shape == (2, 16, 32)
    assert features.cls is None
    assert features.pool_attention is None


def test_levels_are_the_blocks_outputs():
    model, pixels = tiny_siglip(), tiny_images(2)
    tower = SiglipVisionTower(model, feature_levels=[0, 2])
    features, states = tower(pixels), model(pixels, output_hidden_states=True).hidden_states
    for level, index in zip(features.levels, (0, 2)):
        torch.testing.assert_close(level, states[index + 1], rtol=1e-12, atol=1e-12)
    assert tower.num_blocks == 3
    assert torch.equal(features.patches, features.levels[-1])


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_pool_attention_is_the_head_s_own(layer):
    """The whole head as transformers runs it, its weights asked for, head by head."""
    model, pixels = tiny_siglip(), tiny_images(3)
    ours = SiglipVisionTower(model, select_layer=layer)(pixels, with_pool_attention=True).pool_attention
    last = model(pixels).last_hidden_state
    probe = model.head.probe.repeat(3, 1, 1)
    pooled, weights = model.head.attention(probe, last, last, average_attn_weights=False)
    assert pooled.shape == (3, 1, 32)
    torch.testing.assert_close(ours, weights[:, :, 0].sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.sum(1), torch.full((3,), 4.0, dtype=torch.float64))
    assert not ours.requires_grad


def test_used_parameters_are_those_that_features_depend_on():
    tower = SiglipVisionTower(tiny_siglip(), select_layer=2)
    tower(tiny_images(1)).patches.square().sum().backward()
    with_gradient = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    used = tower.used_parameters()
    assert set(used) == with_gradient
    depths = {name.split("vision_model.")[1].split(".")[0:3][-1]: depth for name, (_, depth) in used.items()}
    assert (depths["0"], depths["1"]) == (1, 2)
    assert used["vision_tower.vision_model.embeddings.patch_embedding.weight"][1] == 0


def test_another_picture_size_keeps_the_rest():
    model = tiny_siglip()
    larger = at_image_size(model, 64)
    assert larger.embeddings.position_embedding.weight.shape == (64, 32)
    tower = SiglipVisionTower(larger)
    assert tower(torch.zeros(1, 3, 64, 64, dtype=torch.float64)).patches.shape == (1, 64, 32)
    assert tower.dummy_images().shape == (1, 3, 64, 64)
    grid = model.embeddings.position_embedding.weight.view(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid.float(), size=(8, 8), mode="bicubic", align_corners=False)
    expected = grid[0].flatten(1).T.double()
    torch.testing.assert_close(larger.embeddings.position_embedding.weight, expected, rtol=1e-6, atol=1e-7)


def test_distinctiveness_equals_loops():
    patches = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(3))
    patches[0, 4] = patches[0, 2] * 3
    scores = distinctiveness(VisionFeatures(patches))
    for view in range(3):
        for i in range(9):
            cosines = [
                float(
                    torch.dot(patches[view, i], patches[view, j]) / (patches[view, i].norm() * patches[view, j].norm())
                )
                for j in range(9)
                if j != i
            ]
            assert float(scores[view, i]) == pytest.approx(-sum(cosines) / len(cosines), abs=1e-6)


def test_distinctiveness_makes_no_map_of_all_pairs():
    """The largest tensor is as large as the patches themselves."""
    patches = torch.randn(2, 2**10, 4)
    with LargestTensor() as largest:
        scores = distinctiveness(VisionFeatures(patches))
    assert scores.shape == (2, 2**10)
    assert largest.size <= patches.numel()
    assert distinctiveness(VisionFeatures(torch.ones(1, 1, 4))).tolist() == [[0.0]]


def test_the_odd_patch_out_is_retained():
    patches = torch.ones(1, 8, 4) + 0.01 * torch.randn(1, 8, 4)
    patches[0, 5] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    keep, _ = split_by_score(distinctiveness(VisionFeatures(patches)), 1)
    assert keep.tolist() == [[5]]


@pytest.mark.parametrize("selection", ["pool_attention", "distinctiveness"])
def test_groups_equal_the_method_by_hand(selection):
    model = siglip_model({**SKIP, "selection": selection})
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    images = tiny_images(3)
    with torch.no_grad():
        groups = model.encode_images(images)
        for image, group in zip(images, groups):
            features = tower(image.unsqueeze(0), **wants_of(selection))
            scores = get_selector(selection)(features)[0].tolist()
            best = sorted(sorted(range(16), key=lambda i: -scores[i])[:4])
            rest = [i for i in range(16) if i not in best]
            projected = projector.project(features.patches)[0]
            retained, skipped = projected[best], merge_by_loops(projected[rest], 5)
            former = summary_by_loop(retained, projector.summary.former.weight)
            latter = summary_by_loop(skipped, projector.summary.latter.weight)
            expected = torch.cat([retained, former[None], skipped, latter[None]])
            torch.testing.assert_close(group.tokens, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("selection", ["pool_attention", "distinctiveness"])
def test_a_trained_encoder_gets_gradients_through_its_patches(selection):
    model = siglip_model({**SKIP, "selection": selection}).train()
    tower = model.get_vision_tower()
    tower.requires_grad_(True)
    ids, mask, labels, count = ragged_batch()
    model(input_ids=ids, attention_mask=mask, labels=labels, images=tiny_images(count)).loss.backward()
    with_gradient = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(tower.used_parameters())


def test_each_selection_asks_for_what_it_reads():
    assert set(NEEDS) <= set(SELECTORS)
    model = siglip_model({**SKIP, "selection": "distinctiveness"})
    pixels = tiny_images(1)
    with pytest.raises(ValueError, match="no CLS token"):
        model.get_vision_tower()(pixels, with_cls_attention=True)
    with pytest.raises(ValueError, match="no pooling head"):
        tiny_model().get_vision_tower()(pixels, with_pool_attention=True)
    features = model.get_vision_tower()(pixels)
    for selection in NEEDS:
        with pytest.raises(ValueError, match=f"selection '{selection}' needs"):
            get_selector(selection)(features)


def test_what_an_encoder_provides():
    clip, siglip = VISION_TOWERS["clip_vision_model"], VISION_TOWERS["siglip_vision_model"]
    assert clip.provides(CLIPVisionConfig().to_dict()) == {"CLS token"}
    assert siglip.provides(SiglipVisionConfig().to_dict()) == {"pooling head"}
    assert siglip.provides(SiglipVisionConfig(vision_use_head=False).to_dict()) == set()
