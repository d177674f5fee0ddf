"""Attention to tokens laid on patches, against places written down by hand, family by family."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_sv.analysis.attention_places import GRIDS, Places
from llava_sv.eval.patches import patch_plan
from llava_sv.generation import load_for_inference, make_batch, user_turn
from llava_sv.mm_utils import load_image
from llava_sv.model.builders import BUILDERS
from llava_sv.model.token_groups import TokenRole
from tests.parity.tiny import FAMILIES, SIDE, family_images, family_model

GRID = 4
"""Patches a side of one view, in the tiny models."""


def test_every_family_is_here():
    assert list(GRIDS) == list(BUILDERS)


def assistant_of(model):
    processor = SimpleNamespace(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25])
    return SimpleNamespace(model=model, image_processor=processor)


@torch.no_grad()
def placed(model, image, size, channels=3, sizes=None):
    """(canvases, roles [n], mass [K, n]) of random attention to the tokens of one image."""
    with Places(assistant_of(model)) as places:
        (group,) = model.encode_images([image], sizes)
    mass = torch.rand(channels, len(group), generator=torch.Generator().manual_seed(5))
    return places.canvases(image, size, group.roles, mass), group.roles, mass


def close(mass, expected):
    np.testing.assert_allclose(mass, expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def members_by_loops(model, image, views):
    """Of each merged token, in order: the patches of `views` [(view, patch)] that it is the mean of."""
    from llava_sv.model.compression.merge import plan_merge

    features = model.get_vision_tower()(image)
    tokens = model.get_model().mm_projector.project(features.patches)
    chosen = torch.stack([tokens[view, patch] for view, patch in views])
    plan = plan_merge(chosen[None], model.config.skip_vision.num_skipped)
    groups: list[list[tuple[int, int]]] = [[] for _ in range(plan.kept.shape[1])]
    for place, slot in zip(views, plan.target[0].tolist()):
        groups[slot].append(place)
    return groups


def test_llava_patches_against_the_picture_of_patches(skip_checkpoint, pictures):
    assistant = load_for_inference(str(skip_checkpoint), device="cpu")
    image = load_image(pictures / "a.png")
    plan = patch_plan(assistant, image)
    batch = make_batch(assistant, [[user_turn("What?", 1)]], [[image]])
    with torch.no_grad(), Places(assistant) as places:
        (group,) = assistant.model.encode_images(batch.images, batch.image_sizes)
    mass = torch.rand(2, len(group))
    (canvas,) = places.canvases(batch.images[0], image.size, group.roles, mass)
    expected = np.zeros((2, plan.side**2))
    retained = mass[:, group.roles == TokenRole.RETAINED].numpy()
    skipped = mass[:, group.roles == TokenRole.SKIPPED].numpy()
    for place, patch in enumerate(plan.retained):
        expected[:, patch] += retained[:, place]
    for place, patch in enumerate(plan.kept):
        members = [patch, *(other for other, target in plan.merged_into.items() if target == patch)]
        expected[:, members] += skipped[:, [place]] / len(members)
    close(canvas.mass.reshape(2, -1), expected)
    assert np.flatnonzero(canvas.retained).tolist() == plan.retained
    assert canvas.name == "picture"
    np.testing.assert_allclose(canvas.pixels, plan.pixels, atol=1e-6)
    assert any(target != patch for patch, target in plan.merged_into.items())


def test_hd_tiles_stand_at_their_places():
    model = family_model("llava_hd")
    image = family_images("llava_hd", 1)[0]
    assert len(image) == 5  # overview and 2 x 2 tiles
    canvases, roles, mass = placed(model, image, (2 * SIDE, 2 * SIDE))
    overview, tiles = canvases
    assert (overview.name, tiles.name) == ("overview", "tiles")
    close(overview.mass.reshape(3, -1), mass[:, roles == TokenRole.RETAINED])
    places = [(view, patch) for view in range(1, 5) for patch in range(GRID**2)]
    expected = np.zeros((3, 2 * GRID, 2 * GRID))
    skipped = mass[:, roles == TokenRole.SKIPPED].numpy()
    for token, members in enumerate(members_by_loops(model, image, places)):
        for view, patch in members:
            row = (view - 1) // 2 * GRID + patch // GRID
            column = (view - 1) % 2 * GRID + patch % GRID
            expected[:, row, column] += skipped[:, token] / len(members)
    close(tiles.mass, expected)
    assert tiles.pixels.shape == (2 * SIDE, 2 * SIDE, 3)
    below_left = (image[3].permute(1, 2, 0) * 0.25 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(tiles.pixels[SIDE:, :SIDE], below_left, atol=1e-6)
    assert overview.retained.all()
    assert not tiles.retained.any()


def test_hd_without_tiles_has_an_overview_alone():
    image = family_images("llava_hd", 2)[1]
    (overview,), roles, mass = placed(family_model("llava_hd"), image, (SIDE, SIDE))
    assert overview.name == "overview"
    close(overview.mass.reshape(3, -1), mass[:, roles == TokenRole.RETAINED])


def test_cos_windows_cover_their_cells():
    """Scales of 1, 2 x 2 and 4 x 4 windows with 2 x 2, 4 x 4 and 4 x 4 queries; the last is merged and skipped."""
    model = family_model("cos")
    image = family_images("cos", 1)[0]
    (canvas,), roles, mass = placed(model, image, (SIDE, SIDE))
    expected = np.zeros((3, GRID, GRID))
    coarse = mass[:, roles == TokenRole.RETAINED].numpy()
    assert coarse.shape[1] == 4
    expected += coarse.sum(1)[:, None, None] / GRID**2
    fine = mass[:, roles == TokenRole.FINE].numpy()
    for query in range(16):
        top, left = query // 4 // 2 * 2, query % 4 // 2 * 2
        expected[:, top : top + 2, left : left + 2] += fine[:, query][:, None, None] / 4
    from llava_sv.model.compression.merge import plan_merge

    with torch.no_grad():
        tower, projector = model.get_vision_tower(), model.get_model().mm_projector
        finest = projector.tokens_of(tower(image[None]))[:, 20:]
        plan = plan_merge(finest, model.config.skip_vision.num_skipped)
    target = plan.target[0].tolist()
    skipped = mass[:, roles == TokenRole.SKIPPED].numpy()
    for query in range(16):
        expected[:, query // 4, query % 4] += skipped[:, target[query]] / target.count(target[query])
    close(canvas.mass, expected)


SWITCHES = {
    "default": {},
    "last visual token": {"last_visual_ffn": True},
    "no merge": {"merge": False},
    "no summaries": {"former_summary": False, "latter_summary": False},
    "summary norm": {"summary_norm": "layernorm"},
    "fewer retained": {"num_retained": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", SWITCHES)
def test_all_mass_but_the_summaries_is_on_the_picture(family, variant):
    model = family_model(family, SWITCHES[variant])
    image = family_images(family, 1)[0]
    canvases, roles, mass = placed(model, image, (2 * SIDE, 2 * SIDE))
    total = sum(canvas.mass.sum(axis=(1, 2)) for canvas in canvases)
    close(total, mass[:, roles != TokenRole.SUMMARY].sum(1))
    assert all((canvas.mass >= 0).all() for canvas in canvases)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_tokens_stand_at_their_own_patches(family):
    model = family_model(family, dense=True)
    image = family_images(family, 1)[0]
    canvases, _, mass = placed(model, image, (2 * SIDE, 2 * SIDE))
    close(sum(canvas.mass.sum(axis=(1, 2)) for canvas in canvases), mass.sum(1))
    if family == "llava":
        close(canvases[0].mass.reshape(3, -1), mass)
    if family == "llava_hd":
        close(canvases[1].mass[:, :GRID, GRID:].reshape(3, -1), mass[:, 2 * GRID**2 : 3 * GRID**2])


@pytest.mark.parametrize("dense", [False, True])
def test_anyres_leaves_padding_empty_and_newlines_out(dense):
    """A picture four times as wide as high, fitted into 2 x 1 tiles: rows above and below are padding."""
    pinpoints = [[2 * SIDE, SIDE]]
    model = family_model(
        "llava_hd", dense=dense, image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints, hd_max_tiles=2
    )
    image, size = family_images("llava_hd", 3)[2], (4 * SIDE, SIDE)
    assert len(image) == 3
    (overview, tiles), roles, mass = placed(model, image, size, sizes=[size])
    rows = tiles.mass.sum(axis=(0, 2))
    assert rows[0] == rows[-1] == 0
    assert (rows[1:-1] > 0).all()
    if not dense:
        close(overview.mass.sum((1, 2)) + tiles.mass.sum((1, 2)), mass[:, roles != TokenRole.SUMMARY].sum(1))
        return
    rest = mass[:, GRID**2 :].reshape(3, 2, 2 * GRID + 1)  # two rows, each with its newline
    close(tiles.mass[:, 1:3], rest[..., :-1])


def test_half_precision_loses_no_mass():
    model = family_model("llava_hd").bfloat16()
    image = family_images("llava_hd", 1)[0].bfloat16()
    canvases, roles, mass = placed(model, image, (2 * SIDE, 2 * SIDE))
    total = sum(canvas.mass.sum(axis=(1, 2)) for canvas in canvases)
    close(total, mass[:, roles != TokenRole.SUMMARY].sum(1))


def test_more_channels_than_the_model_is_wide():
    model = family_model("llava")
    image = family_images("llava", 1)[0]
    many, _, mass = placed(model, image, (SIDE, SIDE), channels=101)
    with torch.no_grad(), Places(assistant_of(model)) as places:
        (group,) = model.encode_images([image])
    last = places.canvases(image, (SIDE, SIDE), group.roles, mass[100:])
    close(many[0].mass[100], last[0].mass[0])
