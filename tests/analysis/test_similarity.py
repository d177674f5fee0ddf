"""`analyze similarity` against loops over pairs, on groups that are put together by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from llava_sv import cli
from llava_sv.analysis import similarity
from llava_sv.analysis.streaming import Running
from tests.analysis.families import BUDGETS, save_family
from tests.analysis.test_common import job_of
from tests.parity.oracle import merge_by_loops


def cosine(a, b):
    return float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())


def by_loops(tokens):
    """(Cosines of all pairs, each token's average to the others)."""
    tokens = list(tokens.double())
    every = [[cosine(a, b) for b in tokens] for a in tokens]
    count = len(tokens)
    pairs = [every[i][j] for i in range(count) for j in range(i + 1, count)]
    return pairs, [sum(row[j] for j in range(count) if j != i) / (count - 1) for i, row in enumerate(every)]


def groups_by_hand(job, sample, family, skip):
    """The projector's tokens of one picture, cut by the paper's rules."""
    model = job.model
    pixels = sample.batch.images[0]
    features = model.get_vision_tower()(pixels if pixels.dim() == 4 else pixels.unsqueeze(0))
    tokens = model.model.mm_projector.tokens_of(features)
    budget = BUDGETS[family]
    if family == "cos":
        made, rest = {"16": tokens[0, :16], "64": tokens[0, 16:]}, tokens[0, budget["num_retained"] :]
    elif family == "llava_hd":
        made = {"overview": tokens[0], "tiles": torch.cat(list(tokens[1:]))}
        rest = made["tiles"]
    elif not skip:
        return {"all": tokens[0]}
    else:
        scores = [cosine(patch, features.cls[0]) for patch in features.patches[0]]
        kept = sorted(sorted(range(16), key=lambda i: -scores[i])[: budget["num_retained"]])
        rest = tokens[0, [i for i in range(16) if i not in kept]]
        made = {"retained": tokens[0, kept], "skipped": rest}
    return {**made, "merged": merge_by_loops(rest, budget["num_skipped"])} if skip else made


@pytest.mark.parametrize(("skip", "last"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("family", BUDGETS)
@torch.no_grad()
def test_every_group_by_loops(family, skip, last, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", 7)
    checkpoint = save_family(tmp_path / "model", family, skip, last_visual_ffn=last)
    flags = ["--model-path", str(checkpoint), "--image-folder", str(pictures), "--device", "cpu", "--num-images", "2"]
    assert cli.main(["analyze", "similarity", *flags, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "similarity.json").read_text())
    arrays = np.load(tmp_path / "out" / "similarity.npz")
    job, expected = job_of(checkpoint, pictures, "--num-images", "2"), {}
    for sample in job.samples("by hand"):
        for name, tokens in groups_by_hand(job, sample, family, skip).items():
            pairs, averages = by_loops(tokens)
            found = expected.setdefault(name, {"pairs": [], "average": [], "tokens": 0})
            found["pairs"] += pairs
            found["average"] += averages
            found["tokens"] += len(tokens)
    names = {"window 4, 16 tokens": "16", "window 1, 64 tokens": "64"}
    assert [names.get(name, name) for name in report["groups"]] == list(expected)
    assert arrays["groups"].tolist() == list(report["groups"])
    for row, (name, one) in enumerate(report["groups"].items()):
        plain = expected[names.get(name, name)]
        assert one["tokens_per_image"] == plain["tokens"] / 2
        for measure in ("pairs", "average"):
            values = np.array(plain[measure])
            assert one[measure]["count"] == len(values)
            assert one[measure]["mean"] == pytest.approx(values.mean(), abs=1e-5)
            assert one[measure]["deviation"] == pytest.approx(values.std(ddof=1), abs=1e-5)
            counted = np.histogram(np.clip(values, -1, 1), arrays["edges"])[0]
            # a cosine within rounding of an edge may fall on either side of it
            assert np.abs(np.cumsum(counted) - np.cumsum(arrays[f"{measure}_bins"][row])).max() <= 1
            assert (arrays[f"{measure}_density"][row] * np.diff(arrays["edges"])).sum() == pytest.approx(1.0)
            assert arrays[f"{measure}_mean"][row] == pytest.approx(one[measure]["mean"])
    assert (tmp_path / "out" / "similarity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("skip", [True, False])
def test_anyres_tiles_come_without_their_padding(skip, tmp_path, pictures):
    settings = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
    checkpoint = save_family(tmp_path / "model", "llava_hd", skip, settings)
    flags = ["--model-path", str(checkpoint), "--image-folder", str(pictures), "--device", "cpu"]
    assert cli.main(["analyze", "similarity", *flags, "--output", str(tmp_path / "out")]) == 0
    groups = json.loads((tmp_path / "out" / "similarity.json").read_text())["groups"]
    # pictures of 64 x 48 on 2 x 2 tiles of 4 x 4 patches: 8 columns, of 8 rows the 6 that hold something
    assert [groups[name]["tokens_per_image"] for name in ("overview", "tiles")] == [16, 48]
    assert ("merged" in groups) == skip


def test_twins_opposites_and_a_token_alone():
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-3.0, 0.0], [0.0, 5.0]])
    ((pairs, average),) = similarity.similarities(a)
    assert pairs.tolist() == [1.0, -1.0, 0.0, -1.0, 0.0, 0.0]
    assert average.tolist() == pytest.approx([0.0, 0.0, -2 / 3, 0.0])
    assert not list(similarity.similarities(a[:1]))


def test_smoothing_for_the_eye_keeps_a_flat_density_flat_and_the_area():
    assert similarity.smoothed(np.ones(50)) == pytest.approx(np.ones(50))
    peak = np.zeros(101)
    peak[50] = 3.0
    assert similarity.smoothed(peak).sum() == pytest.approx(3.0)


def test_a_folder_without_pictures(tmp_path, skip_checkpoint, capsys):
    flags = ["--model-path", str(skip_checkpoint), "--image-folder", str(tmp_path), "--output", str(tmp_path / "out")]
    assert cli.main(["analyze", "similarity", *flags]) == 2
    assert "holds no pictures" in capsys.readouterr().err


def test_the_legend_of_three_scales_is_not_cut_off():
    names = ("window 32, 16 tokens", "window 4, 256 tokens", "window 2, 1024 tokens", "merged")
    table = {name: {measure: Running(similarity.EDGES) for measure in similarity.MEASURES} for name in names}
    for measured in table.values():
        for run in measured.values():
            run.add(np.linspace(-0.5, 0.9, 50))
    made = similarity.draw(table, "title")
    made.draw_without_rendering()
    (legend,) = made.legends
    box = legend.get_window_extent()
    pyplot.close(made)
    assert box.x0 >= 0
    assert box.x1 <= made.bbox.width
