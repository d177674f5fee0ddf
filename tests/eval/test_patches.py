"""The picture of patches: the plan against a plain loop over the same features, and the drawing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_sv.errors import UserError
from llava_sv.eval.patches import draw, patch_plan
from llava_sv.eval.tasks import TASKS
from llava_sv.generation import load_for_inference
from llava_sv.mm_utils import load_image, process_images
from llava_sv.model.compression.adaptive import choose_counts
from llava_sv.model.compression.select import cls_similarity


@pytest.fixture(scope="module")
def picture(bench):
    return load_image(TASKS["toy"].load(bench)[0].images[0])


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@torch.inference_mode()
def plan_by_loops(assistant, image):
    """Retained, kept and merged as section 4.1 words it, one patch at a time."""
    model, skip = assistant.model, assistant.model.config.skip_vision
    pixels = process_images([image], assistant.image_processor, model.config)[0]
    features = model.get_vision_tower()(pixels[None])
    patches, cls = features.patches[0].double().tolist(), features.cls[0].double().tolist()
    likeness = [cosine(patch, cls) for patch in patches]
    retained = sorted(sorted(range(len(patches)), key=lambda i: -likeness[i])[: skip.num_retained])
    rest = [i for i in range(len(patches)) if i not in retained]
    tokens = model.get_model().mm_projector.project(features.patches)[0].double().tolist()
    average = {i: sum(cosine(tokens[i], tokens[j]) for j in rest if j != i) / (len(rest) - 1) for i in rest}
    kept = sorted(sorted(rest, key=lambda i: average[i])[: skip.num_skipped])
    joins = {i: max(kept, key=lambda k: cosine(tokens[i], tokens[k])) for i in rest if i not in kept}
    return retained, kept, joins


def test_plan_equals_a_plain_loop_and_covers_every_patch(skip_assistant, picture):
    plan = patch_plan(skip_assistant, picture)
    retained, kept, joins = plan_by_loops(skip_assistant, picture)
    assert plan.retained == retained
    assert plan.kept == kept
    assert plan.merged_into == joins
    assert sorted([*plan.retained, *plan.kept, *plan.merged_into]) == list(range(plan.side**2))


def test_where_content_decides_the_plan_is_that_of_its_own_count(skip_assistant, picture, monkeypatch):
    config, fixed = skip_assistant.model.config, skip_assistant.model.config.skip_vision
    bounds = {"retained_mean": fixed.num_retained, "retained_min": 1, "retained_max": 8}
    for threshold in (0.2, 0.5, 0.7):
        auto = replace(fixed, num_retained="auto", **bounds, retained_threshold=threshold)
        monkeypatch.setattr(config, "skip_vision", auto)
        plan = patch_plan(skip_assistant, picture)
        pixels = process_images([picture], skip_assistant.image_processor, config)[0]
        with torch.inference_mode():
            count = int(choose_counts(cls_similarity(skip_assistant.model.get_vision_tower()(pixels[None])), auto))
        assert (len(plan.retained), len(plan.kept)) == (count, fixed.num_retained + fixed.num_skipped - count)
        monkeypatch.setattr(config, "skip_vision", auto.at(count))
        assert (plan.retained, plan.kept, plan.merged_into) == plan_by_loops(skip_assistant, picture)


def test_pixels_are_the_image_again(skip_assistant):
    plan = patch_plan(skip_assistant, Image.new("RGB", (40, 40), (200, 100, 50)))
    assert np.allclose(plan.pixels[5, 5] * 255, (200, 100, 50), atol=1)


def test_drawing_fades_what_is_skipped_and_writes_a_png(skip_assistant, picture, tmp_path):
    plan = patch_plan(skip_assistant, picture)
    path = tmp_path / "sub" / "patches.png"
    draw(plan, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert [p.name for p in path.parent.iterdir()] == ["patches.png"]


def test_a_dense_checkpoint_has_no_plan(dense_checkpoint, picture):
    with pytest.raises(UserError, match="needs a skipping checkpoint"):
        patch_plan(load_for_inference(str(dense_checkpoint), device="cpu"), picture)
