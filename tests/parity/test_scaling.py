"""Compound token scaling: a pretrained resampler's weights for a preset with more tokens, query by query."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from llava_sv.errors import UserError
from llava_sv.model.checkpoint_io import load_projector
from llava_sv.model.cos_presets import PRESETS
from tests.parity.tiny import features_of, tiny_model


def model_of(projector_type: str, grid: int = 16, seed: int = 0, levels: int = 2, **settings):
    """A tiny LLaVA whose encoder has `grid` x `grid` patches."""
    settings = {"mm_vision_feature_levels": list(range(levels)), "mm_family": "cos", **settings}
    model = tiny_model(None, seed, mm_projector_type=projector_type, **settings)
    model.config.vision_config = {**model.config.vision_config, "image_size": 8 * grid}
    return model


def projector_of(model):
    return model.get_model().mm_projector


def saved(model, path) -> str:
    """The file that pretraining writes."""
    weights = {f"model.mm_projector.{key}": value for key, value in projector_of(model).state_dict().items()}
    torch.save(weights, path / "mm_projector.bin")
    return str(path / "mm_projector.bin")


@pytest.mark.parametrize(
    ("source", "wanted", "takes", "repeats"),
    [
        ("cos_80", "cos_80_448", [0, 1], [1, 1]),
        ("cos_80", "cos_336", [0, 1, 1], [1, 1, 2]),
        ("cos_80", "cos_1296", [0, 1, 1], [1, 2, 4]),
        ("cos_336", "cos_1296", [0, 1, 2], [1, 2, 2]),
        ("cos_80", "cos", [0, 1, 1], [1, 3, 3]),
    ],
)
def test_scaled_weights_are_the_repeated_ones(tmp_path, caplog, source, wanted, takes, repeats):
    old = model_of(source)
    custom = {"cos_windows": [24, 2, 2], "cos_queries": [16, 576, 576]} if wanted == "cos" else {}
    new = model_of(wanted, grid=24 if custom else 16, seed=1, **custom)
    with caplog.at_level(logging.INFO):
        load_projector(new, saved(old, tmp_path))
    assert "cos_80" in caplog.text or "cos_336" in caplog.text
    assert wanted in caplog.text
    before, after = dict(projector_of(old).named_parameters()), dict(projector_of(new).named_parameters())
    grids = [per_side for per_side, _ in PRESETS[source]]
    for name, value in after.items():
        if not name.startswith("scales."):
            assert torch.equal(value, before[name])
            continue
        _, index, rest = name.split(".", 2)
        taken = before[f"scales.{takes[int(index)]}.{rest}"]
        if rest != "queries":
            assert torch.equal(value, taken)
            continue
        times = repeats[int(index)]
        windows = grids[takes[int(index)]]
        own = taken.shape[0] // windows
        assert value.shape[0] == times * taken.shape[0]
        for row, column in itertools.product(range(value.shape[0]), repeat=2):
            window = row // own // times, column // own // times
            place = window[0] * own + row % own, window[1] * own + column % own
            assert torch.equal(value[row, column], taken[place])


@pytest.mark.parametrize("wanted", ["cos_80_448", "cos_336"])
def test_at_equal_windows_the_function_is_the_same(tmp_path, wanted):
    """A scale whose grid of windows is that of the pretrained one gives its tokens, bit for bit."""
    old, new = model_of("cos_80"), model_of(wanted, seed=1)
    load_projector(new, saved(old, tmp_path))
    for grid in (16, 32):
        features = features_of(grid, width=32)
        for source, target, (per_side, _) in zip(projector_of(old).scales, projector_of(new).scales, PRESETS["cos_80"]):
            assert torch.equal(source(features.levels, per_side), target(features.levels, per_side))
        before, after = (projector_of(model).tokens_of(features) for model in (old, new))
        torch.testing.assert_close(after[:, :80], before, rtol=1e-14, atol=1e-14)


def test_repeated_windows_see_alike(tmp_path):
    """Where all fine windows of a coarse one hold equal features, its repeated queries give equal tokens."""
    old, new = model_of("cos_80"), model_of("cos_1296", seed=1)
    load_projector(new, saved(old, tmp_path))
    tile = torch.randn(2, 1, 2, 1, 2, 32, dtype=torch.float64)
    features = tile.expand(2, 8, 2, 8, 2, 32).reshape(2, 256, 32)
    tokens = projector_of(new).scales[1]([features, features], 8).view(2, 4, 2, 2, 4, 2, 2, 32)
    torch.testing.assert_close(tokens, tokens[:, :, :1, :, :, :1].expand_as(tokens), rtol=1e-13, atol=1e-13)


LLAVA = {"mm_family": "llava", "mm_vision_feature_levels": None}


@pytest.mark.parametrize(
    ("source", "wanted", "said"),
    [
        (
            ("cos_336", {}),
            ("cos_80", {}),
            "is of mm_projector_type cos_336, and the model wants cos_80 of 16.64 queries",
        ),
        (("cos_1296", {}), ("cos_336", {}), "is of mm_projector_type cos_1296, and the model wants cos_336 of"),
        (
            ("cos", {"cos_windows": [16, 8], "cos_queries": [16, 100]}),
            ("cos_336", {}),
            r"a resampler of 16\+100 queries, and the model wants cos_336 .* compound scaling goes to",
        ),
        (
            ("mlp2x_gelu", LLAVA),
            ("cos_80", {}),
            "is of mm_projector_type mlp2x_gelu, and the model wants cos_80, which",
        ),
        (("linear", LLAVA), ("cos_80", {}), "is of mm_projector_type linear, and the model wants cos_80, which"),
        (
            ("cos_80", {}),
            ("mlp2x_gelu", LLAVA),
            "is of mm_projector_type cos_80 or cos_80_448, and the model wants mlp2x",
        ),
        (
            ("cos_80", {"mm_hidden_size": 64}),
            ("cos_336", {}),
            "for an encoder of width 64, and this one is 32: scaling",
        ),
        (("cos_80", {"hidden_size": 64}), ("cos_336", {}), "a language model of width 64, and this one is 48: scaling"),
        (("cos_80", {"levels": 1}), ("cos_336", {}), "feature levels .* of 1, and this one is 2: scaling"),
    ],
)
def test_a_file_that_cannot_be_scaled_ends_in_one_line(tmp_path, source, wanted, said):
    path = saved(model_of(source[0], **source[1]), tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        load_projector(model_of(wanted[0], **wanted[1]), path)
    assert "\n" not in str(caught.value)


def test_a_torn_file_names_its_keys(tmp_path):
    model = model_of("cos_80")
    weights = {f"mm_projector.{key}": value for key, value in projector_of(model).state_dict().items()}
    del weights["mm_projector.scales.1.levels.0.q_proj.weight"]
    torch.save(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"missing keys: scales.1.levels.0.q_proj.weight, scales.2"):
        load_projector(model_of("cos_336"), str(tmp_path))


@pytest.mark.parametrize(("windows", "queries"), [([16, 4, 2], [16, 64, 1024]), ([8, 2], [16, 256])])
def test_a_preset_s_windows_are_known(tmp_path, windows, queries):
    """cos_80 has 16 queries in its one window and 4 in each of 16 others: no scale may get another number of them."""
    path = saved(model_of("cos_80"), tmp_path)
    with pytest.raises(UserError, match="and as many in each window"):
        load_projector(model_of("cos", cos_windows=windows, cos_queries=queries), path)


def test_maps_of_equal_sides_are_taken_as_they_are(tmp_path):
    """A file says its counts alone: windows of one's own may have a preset's."""
    own = {"cos_windows": [8, 2], "cos_queries": [16, 64]}
    old, new = model_of("cos", **own), model_of("cos", seed=1, **own)
    load_projector(new, saved(old, tmp_path))
    for name, value in projector_of(old).named_parameters():
        assert torch.equal(value, projector_of(new).get_parameter(name))
