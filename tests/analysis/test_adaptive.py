"""Every `analyze` command on a checkpoint whose images choose how many tokens they retain (`num_retained: auto`)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from llava_sv import cli
from llava_sv.data import toy
from llava_sv.model.token_groups import TokenRole
from tests.analysis.families import save_family
from tests.analysis.test_ffn_impact import job_of

AUTO = {"num_retained": "auto", "retained_mean": 4, "retained_min": 2, "retained_max": 7, "retained_threshold": 0.5}
FAMILIES = {
    "llava": ("llava", AUTO),
    "llava, last visual, no summaries": (
        "llava",
        {**AUTO, "last_visual_ffn": True, "former_summary": False, "latter_summary": False},
    ),
    "llava_hd": ("llava_hd", {**AUTO, "num_skipped": 7}),
}
SEES = {
    "ffn-impact": (),
    "similarity": (),
    "attention": ("--max-new-tokens", "2", "--maps", "3"),
    "error-bound": ("--power-iterations", "2"),
    "layer-plan": ("--budget", "0.1"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def adaptive(request, tmp_path_factory):
    family, switches = FAMILIES[request.param]
    return save_family(tmp_path_factory.mktemp("adaptive") / "model", family, **switches)


def run(command, checkpoint, out, *more):
    assert cli.main(["analyze", command, "--model-path", str(checkpoint), "--output", str(out), *more]) == 0
    return json.loads((out / f"{command}.json").read_text()), np.load(out / f"{command}.npz")


def fixed(checkpoint, folder, **block):
    """A copy with a fixed budget in its config.json."""
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in values["skip_vision"].items() if not name.startswith("retained_")}
    values["skip_vision"] = {**kept, **block}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("command", SEES)
def test_each_picture_has_its_own_counts(command, adaptive, pictures, tmp_path):
    given = ("--image-folder", str(pictures), "--device", "cpu", *SEES[command])
    report, arrays = run(command, adaptive, tmp_path / "out", *given)
    job = job_of(adaptive, pictures)
    last = int(job.model.config.skip_vision.last_visual_ffn)
    counts = []
    for sample in job.samples("counts"):
        with torch.no_grad():
            roles = job.splice(sample).token_roles[0]
        counts.append([int((roles == role).sum()) for role in (TokenRole.RETAINED, TokenRole.SKIPPED)])
    retained, skipped = np.mean(counts, axis=0)
    assert len({count for count, _ in counts}) > 1, "the pictures must differ"
    if command == "ffn-impact":
        layers = report["measures"]["update"]
        assert layers["retained"][0]["count"] == 4 * retained
        assert layers["skipped"][1]["count"] == 4 * skipped
    if command == "similarity":
        assert report["groups"]["merged"]["tokens_per_image"] == skipped + last
        if job.model.config.mm_family == "llava":
            assert report["groups"]["retained"]["tokens_per_image"] == retained - last
            assert report["groups"]["skipped"]["tokens_per_image"] == 16 - retained + last
    if command == "attention":
        assert (report["prompt_tokens"]["retained"], report["prompt_tokens"]["skipped"]) == (retained, skipped)
        names = report["groups"]
        for i in range(3):
            placed = arrays["share"][i][:, [names.index("retained"), names.index("skipped")]].sum(-1)
            mass = sum(arrays[name].sum((1, 2)) for name in arrays if name.startswith(f"map_{i}_"))
            np.testing.assert_allclose(mass, placed, atol=1e-5)
    if command == "error-bound":
        assert {row["holds"] for row in report["checks"].values() if row["proved"]} == {4}
    if command == "layer-plan":
        assert report["tokens"]["skipped"] == round(skipped)


@pytest.mark.parametrize(("command", "field"), [("error-bound", "measured"), ("layer-plan", "alone")])
def test_a_fixed_budget_may_be_tried(command, field, adaptive, pictures, tmp_path):
    given = ("--image-folder", str(pictures), "--device", "cpu", "--num-images", "2", *SEES[command])
    tried, _ = run(command, adaptive, tmp_path / "tried", *given, "--num-retained", "3", "--num-skipped", "6")
    copy = fixed(adaptive, tmp_path / "copy", num_retained=3, num_skipped=6)
    wanted, _ = run(command, copy, tmp_path / "wanted", *given)
    assert tried["skip_vision"] == wanted["skip_vision"]
    assert tried[field] == wanted[field]


def test_budgets_of_a_trade_off_and_shares_of_flops(adaptive, tmp_path):
    assert toy.main(["--output", str(tmp_path / "toy"), "--train", "2", "--bench", "6", "--fine-bench", "2"]) == 0
    given = ("--data-path", str(tmp_path / "toy"), "--device", "cpu", "--budgets")
    tried, _ = run("tradeoff", adaptive, tmp_path / "tried", *given, "3/6,dense")
    assert [row["trained_so"] for row in tried["rows"]] == [False, False]
    copy = fixed(adaptive, tmp_path / "copy", num_retained=3, num_skipped=6)
    wanted, _ = run("tradeoff", copy, tmp_path / "wanted", *given, "3/6,dense")
    assert tried["rows"] == [{**row, "trained_so": False} for row in wanted["rows"]]
    own, _ = run("flops-share", adaptive, tmp_path / "own")
    copy = fixed(adaptive, tmp_path / "mean", num_retained=4)
    mean, _ = run("flops-share", copy, tmp_path / "of-mean")
    assert own["settings"] == mean["settings"]


def test_without_a_threshold_it_is_said_in_one_line(pictures, tmp_path, capsys):
    checkpoint = save_family(tmp_path / "model", "llava", **{**AUTO, "retained_threshold": None})
    for command, more in SEES.items():
        flags = ["--model-path", str(checkpoint), "--image-folder", str(pictures), "--device", "cpu"]
        assert cli.main(["analyze", command, *flags, "--output", str(tmp_path / "out"), *more]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert "retained_threshold is not set" in said[0]
