"""The encoder at another picture size: positions as transformers interpolates them, saved and loaded at that size."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_sv.errors import UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.model.builders import build_model
from llava_sv.model.multimodal_encoder.builder import read_vision_config
from llava_sv.model.multimodal_encoder.pretrained import at_image_size, interpolate_positions
from tests.model.checkpoints import make_clip, make_llm

POSITIONS = "embeddings.position_embedding.weight"


def clip(image_size: int = 32, patch_size: int = 8):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
    )
    model = CLIPVisionModel(config).double().eval()
    torch.nn.init.normal_(model.get_parameter(POSITIONS))
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return str(make_llm(root / "llm")), str(make_clip(root / "clip"))


@pytest.mark.parametrize(("old", "new", "patch"), [(32, 64, 8), (32, 16, 8), (32, 56, 8), (224, 448, 14), (42, 28, 14)])
def test_equals_transformers_own_interpolation(old, new, patch):
    """transformers interpolates at each call; here it is done once. The same hidden states, CLS among them."""
    model = clip(old, patch)
    resized = at_image_size(model, new)
    pixels = torch.randn(2, 3, new, new, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        # they interpolate in the weights' precision, here float64, and we in float32
        wanted = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        found = resized(pixels, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 3
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert resized.config.image_size == new
    assert model.config.image_size == old
    changed = {name for name, value in resized.state_dict().items() if not equal(value, model.state_dict()[name])}
    assert changed == {POSITIONS}


def equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("extra", [0, 1])
def test_cls_keeps_its_row_and_an_equal_size_keeps_all(extra):
    positions = torch.randn(extra + 16, 8)
    assert torch.equal(interpolate_positions(positions, 4, 8)[:extra], positions[:extra])
    assert interpolate_positions(positions, 4, 8).shape == (extra + 64, 8)
    assert torch.equal(interpolate_positions(positions, 4, 4), positions)


def test_a_constant_map_stays_constant():
    positions = torch.cat([torch.zeros(1, 4), torch.arange(4.0).expand(9, 4)])
    torch.testing.assert_close(interpolate_positions(positions, 3, 7)[1:], torch.arange(4.0).expand(49, 4))


def test_the_encoder_s_own_size_leaves_it_bit_equal(bases):
    plain = build_model("llava", *bases)[1].get_vision_tower().state_dict()
    asked = build_model("llava", *bases, mm_vision_image_size=32)[1].get_vision_tower().state_dict()
    assert all(torch.equal(asked[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llava", {}), ("llava_hd", {}), ("cos", {"mm_projector_type": "cos_336"})],
)
def test_saved_and_loaded_at_the_new_size(bases, tmp_path, family, settings):
    tokenizer, model, processor = build_model(family, *bases, mm_vision_image_size=64, **settings)
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["vision_config"]["image_size"], config["mm_vision_image_size"]) == (64, 64)
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 64}
    assert preprocessor["crop_size"] == {"height": 64, "width": 64}
    _, loaded, again, _ = load_pretrained_model(str(tmp_path), device="cpu")
    assert again.crop_size["height"] == 64
    own = model.state_dict()
    assert own[f"model.vision_tower.vision_tower.vision_model.{POSITIONS}"].shape == (65, 32)
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    images = torch.randn(2, 1, 3, 64, 64)
    with torch.no_grad():
        found, wanted = (m.eval().encode_images(list(images), [(64, 64)] * 2) for m in (loaded, model))
    assert len(found) == len(wanted) == 2
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, wanted))


@pytest.mark.parametrize("size", [60, 4, 0, -8])
def test_no_multiple_of_the_patch(bases, size):
    with pytest.raises(
        UserError, match=f"{size} pixels are no multiple of the encoder's patch of 8; its own size is 32"
    ):
        read_vision_config(bases[1], size)
