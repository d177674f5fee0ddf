"""The CoS resampler against plain loops over images, scales, windows, heads and queries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_sv.errors import UserError
from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.cos_presets import PRESETS, query_counts, scales_of
from llava_sv.model.multimodal_projector.builder import build_vision_projector
from llava_sv.model.multimodal_projector.resampler import heads_of
from llava_sv.model.token_groups import TokenRole
from tests.parity.largest import LargestTensor
from tests.parity.tiny import features_of, tiny_config

WIDTH = 128
"""Two heads of 64."""


# -- the specification, in loops ------------------------------------------------------------------------------------


def affine(layer, row_E: Tensor) -> Tensor:
    return layer.weight @ row_E + layer.bias


def norm(layer, row_E: Tensor) -> Tensor:
    centred = row_E - row_E.mean()
    return centred / (centred.pow(2).mean() + layer.eps).sqrt() * layer.weight + layer.bias


def gelu(row: Tensor) -> Tensor:
    return row * 0.5 * (1 + torch.erf(row / math.sqrt(2)))


def attend_one(part, query_E: Tensor, window: list[Tensor]) -> Tensor:
    """One query over the features of its window, at one (level, scale)."""
    heads, width = part.heads, query_E.shape[0] // part.heads
    query = affine(part.q_proj, norm(part.query_norm, query_E))
    features = [norm(part.feature_norm, feature) for feature in window]
    keys = [affine(part.k_proj, feature) for feature in features]
    values = [affine(part.v_proj, feature) for feature in features]
    pooled = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = torch.stack([query[own] @ key[own] / math.sqrt(width) for key in keys])
        share = scores.exp() / scores.exp().sum()
        pooled.append(sum(share[i] * value[own] for i, value in enumerate(values)))
    hidden = query_E + affine(part.out_proj, torch.cat(pooled))
    return hidden + affine(part.fc2, gelu(affine(part.fc1, norm(part.mlp_norm, hidden))))


def resample_one(projector, levels: list[Tensor], windows: list[int]) -> Tensor:
    """levels: [N, E] of one image; windows: size of each scale's in cells -> [n, C]."""
    grid = math.isqrt(levels[0].shape[0])
    tokens = []
    for scale, window in zip(projector.scales, windows):
        side = scale.queries.shape[0]
        per_window = side // (grid // window)
        for row, column in itertools.product(range(side), repeat=2):
            top, left = row // per_window * window, column // per_window * window
            cells = [(top + i) * grid + left + j for i in range(window) for j in range(window)]
            query = scale.queries[row, column]
            for part, level in zip(scale.levels, levels):
                query = attend_one(part, query, [level[cell] for cell in cells])
            tokens.append(affine(projector.proj, norm(projector.norm, query)))
    return torch.stack(tokens)


# -- what it is held against ----------------------------------------------------------------------------------------


def resampler(projector_type: str, grid: int, levels: int = 2, seed: int = 0, skip=None, **settings):
    """A float64 resampler with weights far from their start, over a grid of `grid` x `grid` patches."""
    torch.manual_seed(seed)
    settings = {"mm_hidden_size": WIDTH, "mm_vision_feature_levels": list(range(levels)), **settings}
    config = tiny_config(skip, mm_family="cos", mm_projector_type=projector_type, **settings)
    config.vision_config = {**config.vision_config, "image_size": 8 * grid, "patch_size": 8}
    projector = build_vision_projector(config).double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    return projector


CUSTOM = {"cos_windows": [4, 2], "cos_queries": [9, 16]}


@pytest.mark.parametrize(
    ("projector_type", "grid", "levels", "windows", "settings"),
    [
        ("cos", 4, 1, [4, 2], CUSTOM),
        ("cos", 4, 2, [4, 2], CUSTOM),
        ("cos", 4, 3, [4, 2], {**CUSTOM, "mm_hidden_size": 48}),
        ("cos_80", 8, 2, [8, 2], {}),
    ],
)
def test_forward_and_gradients_equal_loops(projector_type, grid, levels, windows, settings):
    projector = resampler(projector_type, grid, levels, **settings)
    features = features_of(grid, levels=levels, width=projector.proj.in_features)
    inputs = [level.requires_grad_() for level in features.levels]
    tokens = projector.tokens_of(features)
    expected = torch.stack([resample_one(projector, [level[v] for level in inputs], windows) for v in range(2)])
    torch.testing.assert_close(tokens, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = dict(projector.named_parameters()) | {f"level {i}": level for i, level in enumerate(inputs)}
    sources = list(named.values())
    found = torch.autograd.grad((tokens * weight).sum(), sources)
    wanted = torch.autograd.grad((expected * weight).sum(), sources)
    for name, got, want in zip(named, found, wanted):
        assert want.abs().max() > 1e-3 or name.endswith("k_proj.bias"), f"{name}: which softmax alone ignores"
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_windows_are_local():
    """One feature changes, at one level: tokens of the windows that hold it change, the others' not by a bit."""
    projector, grid = resampler("cos_336", 16), 16
    for level, row, column in ((0, 0, 0), (1, 5, 10), (1, 15, 15)):
        features = features_of(grid, views=1)
        before = projector.tokens_of(features)[0]
        features.levels[level][0, row * grid + column, ::3] += 1
        changed = (projector.tokens_of(features)[0] != before).any(-1)
        for per_side, queries in PRESETS["cos_336"]:
            side, window = math.isqrt(queries), grid // per_side
            own = side // per_side
            here, changed = changed[:queries].view(side, side), changed[queries:]
            i, j = row // window * own, column // window * own
            assert here[i : i + own, j : j + own].all()
            assert here.sum() == own**2


def test_a_single_level_is_the_encoder_s_output():
    projector = resampler("cos_80", 8, levels=1, mm_vision_feature_levels=None)
    features = features_of(8, levels=1)
    alone = projector.tokens_of(VisionFeatures(features.patches))
    assert torch.equal(alone, projector.tokens_of(features))


@pytest.mark.parametrize(
    ("width", "heads"), [(1024, 16), (768, 12), (128, 2), (64, 1), (24, 1), (160, 2), (195, 3), (193, 1)]
)
def test_heads_are_of_64_where_that_divides(width, heads):
    assert heads_of(width) == heads


def test_roles_in_sequence():
    """The paper's budget: 16 coarse and 256 middle tokens stay, 1024 fine ones merge to 256, a summary after each."""
    skip = {"num_retained": 272, "num_skipped": 256}
    projector = resampler("cos_1296", 32, skip=skip, mm_hidden_size=16)
    with torch.no_grad():
        features = features_of(32, views=2, width=16)
        tokens, groups = projector.tokens_of(features), projector(features, [1, 1])
    runs = [(TokenRole(role), len(list(run))) for role, run in itertools.groupby(groups[0].roles.tolist())]
    assert runs == [
        (TokenRole.RETAINED, 16),
        (TokenRole.FINE, 256),
        (TokenRole.SUMMARY, 1),
        (TokenRole.SKIPPED, 256),
        (TokenRole.SUMMARY, 1),
    ]
    assert len(groups[1]) == projector.config.visual_tokens_per_image((640, 480)) == 530
    assert torch.equal(groups[1].tokens[:272], tokens[1, :272])


def test_work_and_memory_are_the_windows_alone():
    """FLOPs by the formula, every matrix product; and nothing of the size of an N x N map, forward and backward."""
    grid, width = 32, 16
    projector = resampler("cos_1296", grid, mm_hidden_size=width).float()
    features = features_of(grid, views=1, width=width)
    features.levels = [level.float() for level in features.levels]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which the counter sees on CPU too
        projector.tokens_of(features)
    with LargestTensor() as largest:
        tokens = projector.tokens_of(features)
    expected = 2 * 1296 * width * projector.proj.out_features
    for scale in scales_of(projector.config, grid):
        projections = 2 * width**2 * (2 * scale.queries + 2 * grid**2)
        attention = 2 * 2 * scale.queries * scale.window**2 * width
        expected += 2 * (projections + attention + 2 * 8 * width**2 * scale.queries)
    assert counter.get_total_flops() == expected
    with LargestTensor() as backward:
        tokens.sum().backward()
    assert max(largest.size, backward.size) <= 4 * 1296 * width < grid**4 / 8


def test_fresh_weights():
    projector = resampler("cos_80", 8, skip={"num_retained": 16, "num_skipped": 4})
    old = {name: value.clone() for name, value in projector.named_parameters()}
    with torch.no_grad():
        projector.reset_projection()
    for name, value in projector.named_parameters():
        assert torch.equal(value, old[name]) == name.startswith("summary."), name
    assert projector.scales[1].queries.std().item() == pytest.approx(0.02, rel=0.1)
    assert (projector.norm.weight == 1).all()


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "grid", "said"),
    [
        ({"mm_projector_type": "cos_80"}, 6, "4 windows a side do not divide the encoder's grid of 6 x 6"),
        ({"mm_projector_type": "cos", **CUSTOM}, 5, "a window of 4 cells does not divide the encoder's grid of 5 x 5"),
        (
            {"mm_projector_type": "cos", "cos_windows": [4], "cos_queries": [8]},
            4,
            "8 queries do not form equal squares",
        ),
        (
            {"mm_projector_type": "cos", "cos_windows": [2], "cos_queries": [9]},
            4,
            "9 queries do not form equal squares",
        ),
        (
            {"mm_projector_type": "cos", "cos_windows": [0], "cos_queries": [4]},
            4,
            "a window of 0 cells does not divide",
        ),
        ({"mm_projector_type": "cos", "cos_windows": [4, 2], "cos_queries": [4]}, 4, "two lists of equal length"),
        ({"mm_projector_type": "cos"}, 4, "two lists of equal length"),
        ({"mm_projector_type": "cos_81"}, 4, "unknown resampler 'cos_81'; known: cos_80, "),
    ],
)
def test_scales_that_do_not_fit(settings, grid, said):
    with pytest.raises(UserError, match=said):
        scales_of(tiny_config(None, mm_family="cos", **settings), grid)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"mm_family": "cos", "mm_projector_type": "mlp2x_gelu"},
            "does not go with family 'cos', which takes cos_80, ",
        ),
        ({"mm_projector_type": "cos_80"}, "does not go with family 'llava', which takes linear, identity, mlp"),
        ({"mm_family": "llava_hd", "mm_projector_type": "cos"}, "'cos' does not go with family 'llava_hd'"),
        ({"mm_projector_type": "cos_81"}, "unknown projector 'cos_81'; known: linear, .*, cos_80, .*, cos$"),
    ],
)
def test_projectors_and_families_that_do_not_go_together(settings, said):
    with pytest.raises(UserError, match=said):
        build_vision_projector(tiny_config(None, **settings))


def test_a_grid_that_is_not_square():
    projector = resampler("cos_80", 8)
    with pytest.raises(ValueError, match="a square grid of features, got 63"):
        projector.tokens_of(VisionFeatures(torch.zeros(1, 63, WIDTH), levels=[torch.zeros(1, 63, WIDTH)] * 2))


def test_counts_of_queries_need_no_grid():
    assert [sum(query_counts(tiny_config(None, mm_family="cos", mm_projector_type=name))) for name in PRESETS] == [
        80, 80, 336, 1296,
    ]  # fmt: skip
