"""Tokens and roles of the paper's settings at their real geometry, from the projector and from the config."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig

from llava_sv.bench.flops import paper_ratio
from llava_sv.errors import UserError
from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.config import LlavaConfig
from llava_sv.model.multimodal_projector.builder import build_vision_projector
from llava_sv.model.token_counts import check_counts, count_tokens, with_family_budget
from llava_sv.model.token_groups import TokenRole

WIDTH = 16
"""Of encoder and language model: counts do not depend on it."""


def real(family: str, image_size: int, skip: dict | None, **settings) -> LlavaConfig:
    """CLIP ViT-L/14's grid at `image_size`, narrow."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, image_size=image_size, patch_size=14, num_hidden_layers=24, num_attention_heads=2
    )
    config = LlavaConfig(
        hidden_size=WIDTH,
        num_attention_heads=2,
        mm_hidden_size=WIDTH,
        mm_family=family,
        mm_vision_feature_levels=[15, 22] if family == "cos" else None,
        vision_config=vision.to_dict(),
        **settings,
    )
    if skip is not None:
        config.skip_vision = with_family_budget(config, skip)
    check_counts(config)
    return config


def roles_of(config: LlavaConfig, views: int = 1) -> dict[TokenRole, int]:
    """Roles that the projector gives an image of random features."""
    torch.manual_seed(0)
    patches = torch.randn(views, config.num_patches, WIDTH)
    features = VisionFeatures(patches, cls=torch.randn(views, WIDTH), levels=[patches, patches + 1])
    with torch.no_grad():
        (group,) = build_vision_projector(config)(features, [views], [(672, 672)])
    assert len(group) == config.visual_tokens_per_image((672, 672))
    counts = count_tokens(config, (672, 672))
    found = {role: int((group.roles == role).sum()) for role in TokenRole}
    assert found[TokenRole.RETAINED] + found[TokenRole.FINE] == counts.retained
    assert (found[TokenRole.FINE], found[TokenRole.SKIPPED]) == (counts.fine, counts.skipped)
    assert found[TokenRole.SUMMARY] == counts.summaries
    return {role: count for role, count in found.items() if count}


@pytest.mark.parametrize(
    ("family", "size", "skip", "settings", "views", "expected"),
    [
        ("llava", 336, None, {}, 1, {TokenRole.RETAINED: 576}),
        ("llava", 336, {}, {}, 1, {TokenRole.RETAINED: 100, TokenRole.SKIPPED: 156, TokenRole.SUMMARY: 2}),
        ("llava_hd", 336, None, {}, 5, {TokenRole.RETAINED: 2880}),
        ("llava_hd", 336, {}, {}, 5, {TokenRole.RETAINED: 576, TokenRole.SKIPPED: 576, TokenRole.SUMMARY: 2}),
        ("cos", 224, None, {"mm_projector_type": "cos_80"}, 1, {TokenRole.RETAINED: 80}),
        ("cos", 448, None, {"mm_projector_type": "cos_80_448"}, 1, {TokenRole.RETAINED: 80}),
        ("cos", 448, None, {"mm_projector_type": "cos_336"}, 1, {TokenRole.RETAINED: 336}),
        ("cos", 448, None, {"mm_projector_type": "cos_1296"}, 1, {TokenRole.RETAINED: 1296}),
        (
            "cos",
            448,
            {},
            {"mm_projector_type": "cos_1296"},
            1,
            {TokenRole.RETAINED: 16, TokenRole.FINE: 256, TokenRole.SKIPPED: 256, TokenRole.SUMMARY: 2},
        ),
        (
            "cos",
            448,
            {},
            {"mm_projector_type": "cos", "cos_windows": [32, 4, 2], "cos_queries": [16, 256, 1024]},
            1,
            {TokenRole.RETAINED: 16, TokenRole.FINE: 256, TokenRole.SKIPPED: 256, TokenRole.SUMMARY: 2},
        ),
    ],
)
def test_the_table_s_counts_and_roles(family, size, skip, settings, views, expected):
    assert roles_of(real(family, size, skip, **settings), views) == expected


@pytest.mark.parametrize(
    ("family", "size", "skip", "settings", "share"),
    [
        ("llava", 336, {}, {}, 0.247),
        ("llava", 336, {"num_retained": 256, "merge": False}, {}, 0.605),
        ("llava_hd", 336, {}, {}, 0.247),
        ("cos", 448, {}, {"mm_projector_type": "cos_1296"}, 0.260),
    ],
)
def test_flop_shares_of_section_6(family, size, skip, settings, share):
    config = real(family, size, skip, **settings)
    counts = count_tokens(config, (672, 672))
    found = paper_ratio(counts.retained, counts.skipped, config.dense_tokens_per_image((672, 672)))
    assert round(found, 3) == share


@pytest.mark.parametrize(
    ("size", "dense", "skip"),
    [((336, 336), 576, 577), ((1000, 500), 3 * 576, 1154), ((3000, 400), 5 * 576, 1154)],
)
def test_hd_counts_follow_the_tiles(size, dense, skip):
    """An image without tiles skips nothing, and its skipped tokens are not summed up."""
    assert real("llava_hd", 336, None).visual_tokens_per_image(size) == dense
    assert real("llava_hd", 336, {}).visual_tokens_per_image(size) == skip


@pytest.mark.parametrize(
    ("skip", "settings", "most", "dense"),
    [
        (None, {}, 2880, 2880),
        ({}, {}, 1154, 2880),
        ({"num_retained": 64, "num_skipped": 64}, {}, 577, 2880),  # an image without tiles, whose overview stays
        ({"num_retained": 64, "num_skipped": 64}, {"hd_fixed_grid": "2x2"}, 130, 2880),
        (None, {"image_aspect_ratio": "anyres"}, 2880 + 48, 2928),
        (None, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[1344, 336], [336, 1344]]}, 2976, 2976),
        ({}, {"image_aspect_ratio": "anyres"}, 1154, 2928),
    ],
)
def test_the_most_tokens_of_any_image(skip, settings, most, dense):
    """Over images of all shapes; newlines go by rows, so of equally large grids the tall one has more."""
    config = real("llava_hd", 336, skip, **settings)
    assert (config.visual_tokens_per_image(), config.dense_tokens_per_image()) == (most, dense)
    sizes = [(width, height) for width in range(100, 2800, 84) for height in range(100, 2800, 84)]
    assert max(config.visual_tokens_per_image(size) for size in sizes) <= most
    assert max(config.dense_tokens_per_image(size) for size in sizes) <= dense


@pytest.mark.parametrize(
    ("family", "size", "skip", "settings", "message"),
    [
        (
            "llava",
            336,
            {"num_retained": 576, "merge": False},
            {},
            "num_retained 576 leaves nothing to skip of the 576 patches of an image; lower it",
        ),
        (
            "cos",
            448,
            {"num_retained": 1296, "merge": False},
            {"mm_projector_type": "cos_1296"},
            "num_retained 1296 leaves nothing to skip of the 1296 tokens of cos_1296; lower it",
        ),
        ("llava_hd", 336, {"num_retained": 577}, {}, "num_retained 577 is more than the 576 patches of the overview"),
        ("llava_hd", 336, None, {"hd_fixed_grid": "3x2"}, "3x2 has 6 tiles, but hd_max_tiles is 4"),
        ("llava_hd", 336, None, {"hd_max_tiles": 0}, "hd_max_tiles: expected 1 or more, got 0"),
        (
            "llava_hd",
            336,
            None,
            {"image_grid_pinpoints": [[336, 500]]},
            r"\[336, 500\] is no \(width, height\) in multiples of the encoder's 336 pixels",
        ),
        ("llava_hd", 336, {"skip_kv": "fine+skipped"}, {}, "family 'llava_hd' has none"),
        ("llava", 336, {"skip_kv": "fine+skipped"}, {}, "family 'llava' has none"),
        (
            "cos",
            448,
            {"num_retained": 1200},
            {"mm_projector_type": "cos_1296"},
            r"1200 \+ num_skipped 256 is more than the 1296 tokens of cos_1296",
        ),
        (
            "cos",
            336,
            None,
            {"mm_projector_type": "cos_1296"},
            "16 windows a side do not divide the encoder's grid of 24 x 24 patches",
        ),
        (
            "cos",
            448,
            None,
            {"mm_projector_type": "cos", "cos_windows": [32, 5], "cos_queries": [16, 64]},
            "a window of 5 cells does not divide the encoder's grid of 32 x 32",
        ),
        (
            "cos",
            448,
            None,
            {"mm_projector_type": "cos", "cos_windows": [32, 8], "cos_queries": [16, 60]},
            "60 queries do not form equal squares in the 4 x 4 windows",
        ),
        ("cos", 448, None, {"mm_projector_type": "cos"}, "takes its scales from cos_windows and cos_queries"),
    ],
)
def test_what_does_not_fit_is_one_line(family, size, skip, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        real(family, size, skip, **settings)
    assert "\n" not in str(caught.value)
