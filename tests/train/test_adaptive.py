"""`num_retained: auto` from the command line to an answer: the threshold is found, kept, and served; bad input."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_sv import cli
from llava_sv.analysis.common import make_parser
from llava_sv.analysis.tradeoff_budgets import Asked, config_at
from llava_sv.analysis.trajectory import add_budget_flags, open_skipping
from llava_sv.bench.checkpoint import read_checkpoint
from llava_sv.errors import UserError
from llava_sv.eval.ablation_rows import own_row
from llava_sv.eval.retained import summary, take, watching
from llava_sv.model.builder import load_pretrained_model
from llava_sv.model.compression.adaptive import choose_counts, find_threshold
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.loading import read_config
from llava_sv.model.retained_budget import over
from llava_sv.model.token_counts import check_counts, with_family_budget
from llava_sv.model.token_groups import TokenRole
from llava_sv.train import adaptive, train
from llava_sv.train.flags import parse
from llava_sv.train.metrics import read_metrics
from tests.parity.tiny import tiny_config
from tests.train import ranks
from tests.train.runs import run
from tests.train.tiny import SKIPPING

torch.set_num_threads(1)

AUTO = ("--sv_num_retained", "auto", "--sv_retained_mean", "4", "--sv_retained_max", "8")


def block_of(folder):
    return json.loads((folder / "config.json").read_text())["skip_vision"]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """(OUTPUT, what was printed) of SFT with batches by length."""
    output = tmp_path_factory.mktemp("auto") / "skip"
    return output, run(world.flags("skip", output, *AUTO, "--group_by_modality_length", "True"))


def counts_on(model, processor, world):
    """What each training image retains."""
    from llava_sv.mm_utils import load_image, process_images

    names = sorted((world.data / "images").glob("*.png"))
    pixels = process_images([load_image(name) for name in names], processor, model.config)
    with torch.no_grad():
        groups = model.encode_images(pixels)
    return [int((group.roles == TokenRole.RETAINED).sum()) for group in groups]


def test_training_finds_the_threshold_on_its_images_and_keeps_it(trained, world):
    output, printed = trained
    said = re.search(r"threshold ([\d.]+), found on 12 images: ([\d.]+) retained on average, (\d+) to (\d+)", printed)
    block = block_of(output)
    assert block["num_retained"] == "auto"
    assert (block["retained_mean"], block["retained_min"], block["retained_max"]) == (4, 2, 8)
    assert float(said[1]) == pytest.approx(block["retained_threshold"], abs=5e-5)
    _, model, processor, _ = load_pretrained_model(str(output), None, "llava", device="cpu")
    with_image = {i for i in range(16) if i % 4 != 3}
    names = sorted(path.stem for path in (world.data / "images").glob("*.png"))
    counts = [n for n, name in zip(counts_on(model, processor, world), names) if int(name) in with_image]
    assert sum(counts) / 12 == pytest.approx(float(said[2]), abs=0.06)
    assert (min(counts), max(counts)) == (int(said[3]), int(said[4]))
    assert "tokens an image   16 dense -> 11 in the sequence (Skip-Vision)" in printed


def test_losses_fall_and_every_image_takes_the_same_length(trained):
    output, _ = trained
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["visual_tokens"] % 11 == 0 for row in rows)


def test_flops_of_the_checkpoint_are_those_of_the_average(trained, tmp_path, capsys):
    output, _ = trained
    assert cli.main(["flops", "--model-path", str(output), "--json", str(tmp_path / "auto.json")]) == 0
    assert "num_retained auto: counted at the average budget; an image retains 2 to 8" in capsys.readouterr().out
    fixed = ["--num-retained", "4", "--num-skipped", "5"]
    assert cli.main(["flops", "--model-path", str(output), *fixed, "--json", str(tmp_path / "fixed.json")]) == 0
    auto, number = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("auto", "fixed"))
    assert auto["retained_bounds"] == [2, 8]
    assert number["retained_bounds"] is None
    assert auto["paper_ratio"] == number["paper_ratio"]
    assert auto["skip"]["prefill"]["llm"] == number["skip"]["prefill"]["llm"]


def test_going_on_keeps_the_threshold_and_another_budget_finds_its_own(trained, world, tmp_path):
    output, _ = trained
    again = ["--model_name_or_path", str(output), "--max_steps", "1"]
    # `sft` gives no budget of its own
    printed = run(world.flags("sft", tmp_path / "same", *again))
    assert "num_retained auto" not in printed
    assert block_of(tmp_path / "same") == block_of(output)
    printed = run(world.flags("sft", tmp_path / "more", *again, "--sv_retained_mean", "6", "--sv_num_skipped", "7"))
    assert "num_retained auto: threshold" in printed
    assert block_of(tmp_path / "more")["retained_threshold"] > block_of(output)["retained_threshold"]
    run(world.flags("sft", tmp_path / "fixed", *again, "--sv_num_retained", "4"))
    assert block_of(tmp_path / "fixed")["num_retained"] == 4
    assert not any(name.startswith("retained_") for name in block_of(tmp_path / "fixed"))


def test_packs_train(world, tmp_path):
    output = tmp_path / "packed"
    run(world.flags("skip", output, *AUTO, "--packing", "True", "--per_device_train_batch_size", "1"))
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss" in row]
    assert all(0 < row["loss"] < 20 for row in rows)


class Images:
    """A dataset, as far as `settle` reads it; the samples' views are 3 x 2 x 2."""

    def __init__(self, views):
        self.views, self.counts, self.reader = views, self, self

    def forget(self):
        pass

    def modalities(self):
        return np.ones(len(self.views), bool)

    def __getitem__(self, index):
        shape = (self.views[index], 3, 2, 2) if self.views[index] else (3, 2, 2)
        return {"images": [torch.full(shape, float(index))]}


def settled(monkeypatch, views, scores, checkpoint=None, **settings):
    """The `skip_vision` of a model after `settle` on images that score so."""
    model = SimpleNamespace(
        config=SimpleNamespace(skip_vision=SkipVisionConfig(**{"num_retained": "auto", "retained_mean": 4, **settings}))
    )
    monkeypatch.setattr(adaptive, "scores_of", lambda _, seen, __: scores[[int(view[0, 0, 0]) for view in seen]])
    said = adaptive.settle(model, Images(views), torch.device("cpu"), checkpoint)
    return model.config.skip_vision, said


def some_scores(count):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(4))


def test_a_resumed_run_takes_its_checkpoint_s_threshold(tmp_path, monkeypatch):
    block = SkipVisionConfig(num_retained="auto", retained_mean=4, retained_threshold=0.25).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"skip_vision": block}))
    skip, said = settled(monkeypatch, [0] * 30, some_scores(30), tmp_path, num_skipped=8)
    assert skip.retained_threshold == 0.25
    assert "the checkpoint's" in said
    _, said = settled(monkeypatch, [0] * 30, some_scores(30), tmp_path, retained_threshold=0.25)
    assert said == ""


@pytest.mark.parametrize("changed", [{"retained_mean": 6}, {"retained_max": 5}, {"selection": "cls_attention"}])
def test_a_resumed_run_that_chooses_otherwise_finds_its_own(tmp_path, monkeypatch, changed):
    block = SkipVisionConfig(num_retained="auto", retained_mean=4, retained_threshold=0.25).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"skip_vision": block}))
    scores = some_scores(30)
    skip, said = settled(monkeypatch, [0] * 30, scores, tmp_path, **changed)
    assert skip.retained_threshold == find_threshold(scores, skip)[0] != 0.25
    assert "found on 30 images" in said


def test_hd_s_threshold_is_found_on_images_that_skip(monkeypatch):
    scores = some_scores(30)
    scores[::2] = scores[::2].exp() ** 3
    skip, said = settled(monkeypatch, [1, 5] * 15, scores)
    assert skip.retained_threshold == find_threshold(scores[1::2], skip)[0]
    assert abs(find_threshold(scores, skip)[0] - skip.retained_threshold) > 0.01
    assert "found on 15 images" in said
    skip, _ = settled(monkeypatch, [1] * 30, scores)
    assert skip.retained_threshold == find_threshold(scores, skip)[0]


def test_all_ranks_take_the_first_one_s_threshold(monkeypatch, capsys):
    monkeypatch.setattr("llava_sv.cluster.agree.gather", lambda mine: [0.25, mine])
    monkeypatch.setattr(adaptive, "gather", lambda mine: [0.25, mine], raising=False)
    skip, _ = settled(monkeypatch, [0] * 30, some_scores(30))
    assert skip.retained_threshold == 0.25
    assert capsys.readouterr().out == ""


def test_settings_put_over_others():
    auto = SkipVisionConfig(num_retained="auto", retained_mean=4, retained_threshold=0.5).to_dict()
    assert over(auto, {"merge": False})["retained_threshold"] == 0.5
    assert "retained_threshold" not in over(auto, {"selection": "cls_attention"})
    assert "retained_threshold" not in over(auto, {"retained_max": 6})
    assert over(auto, {"retained_mean": 4, "retained_max": auto["retained_max"]}) == auto
    other = over(auto, {"retained_mean": 30})
    assert SkipVisionConfig.from_dict(other).retained_min == 15
    assert SkipVisionConfig.from_dict(over(auto, {"num_retained": 9})) == SkipVisionConfig(num_retained=9)
    assert over(auto, {"retained_threshold": 0.3})["retained_threshold"] == 0.3


def test_answers_come_with_what_their_images_retained(trained, world, tmp_path):
    _, model, processor, _ = load_pretrained_model(str(trained[0]), None, "llava", device="cpu")
    expected = counts_on(model, processor, world)
    with watching(model) as counts:
        assert counts_on(model, processor, world) == expected
    lines = take(counts, [[0] * 5, [], [0] * (len(expected) - 5)])
    assert lines[0] == {"retained_tokens": expected[:5]}
    assert lines[1] == {"retained_tokens": []}
    assert counts == []
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summary(model, path)
    assert found["mean"] == sum(expected) / len(expected)
    assert (found["least"], found["most"], found["images"]) == (min(expected), max(expected), len(expected))
    assert found["budget"] == 4
    model.config.skip_vision = model.config.skip_vision.at(4)
    assert summary(model, path) is None
    with watching(model) as counts:
        assert take(counts, [[0], []]) == [{}, {}]


def test_a_batch_is_looked_for_with_images_that_retain_the_most(trained, world):
    _, model, processor, _ = load_pretrained_model(str(trained[0]), None, "llava", device="cpu")
    before = counts_on(model, processor, world)
    with adaptive.at_the_most(model):
        assert set(counts_on(model, processor, world)) == {8}
    assert counts_on(model, processor, world) == before
    assert min(before) < 8


def test_bounds_are_not_judged_before_the_family_s_average_is_known():
    """100 + 156, what a block without a family has, would refuse both; LLaVA-HD's 288 + 576 holds them."""
    base = ["--model_name_or_path", "m", "--output_dir", "o", "--data_path", "d", "--version", "v1"]
    bounds = {"retained_min": 150, "retained_max": 500}
    flags = ["--mm_family", "llava_hd", "--sv_num_retained", "auto", "--sv_retained_min", "150"]
    block = parse([*base, *flags, "--sv_retained_max", "500"])[0].skip_vision()
    assert block == {"num_retained": "auto", **bounds}
    assert own_row("a: num_retained=auto retained_min=150 retained_max=500", {}).extras == block
    with pytest.raises(UserError, match="retained_mean 100 does not lie within retained_min 150"):
        parse([*base, *flags, "--sv_retained_mean", "100", "--sv_num_skipped", "156"])[0].skip_vision()


@pytest.mark.parametrize(
    ("family", "block", "most"),
    [
        ("llava_hd", {"retained_mean": 12}, 16),
        ("llava_hd", {"retained_mean": 12, "num_skipped": 3}, 14),
        ("llava_hd", {"retained_mean": 7}, 14),
        ("llava", {"retained_mean": 10, "merge": False}, 15),
        ("llava", {"retained_mean": 10, "num_skipped": 4}, 13),
        ("llava", {"retained_mean": 3, "num_skipped": 9}, 6),
    ],
)
def test_the_upper_bound_is_what_there_is_to_retain(family, block, most):
    config = tiny_config(None, mm_family=family)
    config.skip_vision = with_family_budget(config, {"num_retained": "auto", **block})
    check_counts(config)
    assert config.skip_vision.retained_max == most


def test_flags():
    base = ["--model_name_or_path", "m", "--output_dir", "o", "--data_path", "d", "--version", "v1"]
    given = parse([*base, "--sv_num_retained", "auto", "--sv_retained_mean", "64"])[0].skip_vision()
    assert given == {"num_retained": "auto", "retained_mean": 64}
    skip = SkipVisionConfig.from_dict(given)
    assert (skip.retained_min, skip.retained_max, skip.mean_retained, skip.skipped_of(576)) == (32, 128, 64, 156)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_retained": "many"}, "num_retained: expected a whole number of 1 or more, got 'many'; or 'auto'"),
        ({"retained_mean": 8}, "retained_mean goes with num_retained 'auto', not with 100; drop it"),
        ({"num_retained": "auto", "retained_mean": 0}, "retained_mean: expected a whole number of 1 or more, got 0"),
        (
            {"num_retained": "auto", "retained_mean": 8, "retained_min": 9},
            "retained_mean 8 does not lie within retained_min 9 and retained_max 16; change one of them",
        ),
        (
            {"num_retained": "auto", "retained_mean": 8, "retained_min": 4, "retained_max": 3},
            "retained_mean 8 does not lie within retained_min 4 and retained_max 3",
        ),
        (
            {"num_retained": "auto", "retained_mean": 8, "num_skipped": 4, "retained_max": 12},
            r"retained_max 12 leaves nothing to skip of the 12 tokens of an image \(retained_mean 8 \+ num_skipped 4\)",
        ),
        ({"num_retained": "auto", "retained_threshold": 1.5}, "expected a share between 0 and 1, got 1.5"),
        ({"num_retained": "auto", "retained_threshold": True}, "expected a share between 0 and 1, got True"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        SkipVisionConfig.from_dict(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mm_family", "cos", "--mm_projector_type", "cos_80", "--sv_num_retained", "auto"],
            "'auto' chooses among patches, and family 'cos' retains whole scales; give a number",
        ),
        (["--sv_num_retained", "auto"], "retained_mean 100 + num_skipped 5 is more than the 16 patches of an image"),
        (
            [*AUTO, "--sv_merge", "False", "--sv_retained_max", "16"],
            "retained_max 16 is more than 15, the most of the 16 patches of an image that leaves one to skip",
        ),
        (
            ["--mm_family", "llava_hd", *AUTO, "--sv_num_skipped", "20", "--sv_retained_max", "17"],
            "retained_max 17 is more than 16, the most of the overview's patches",
        ),
        (["--sv_retained_mean", "4"], "retained_mean goes with num_retained 'auto', not with 4; drop it"),
        (["--sv_num_retained", "some"], "expected a whole number of 1 or more, got 'some'; or 'auto'"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, world, tmp_path, capsys):
    assert train.main(world.flags("skip", tmp_path / "out", *flags)) == 2
    said = capsys.readouterr().err.strip()
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


def test_an_average_without_auto_is_refused_where_no_checkpoint_says_auto(world, tmp_path, capsys):
    assert train.main(world.flags("sft", tmp_path / "out", "--sv_retained_mean", "4")) == 2
    assert "retained_mean goes with num_retained 'auto', not with 100; drop it" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_are_counted_once(world, tmp_path):
    records = json.loads((world.data / "sft.json").read_text())
    records[0]["image"] = "lost.png"
    path = tmp_path / "lost.json"
    path.write_text(json.dumps(records))
    flags = [*AUTO, "--data_path", str(path), "--missing_images", "blank"]
    run(world.flags("skip", tmp_path / "out", *flags))
    summary_of_run = json.loads((tmp_path / "out" / "train_summary.json").read_text())
    assert summary_of_run["image_problems"] == {"missing": 1, "corrupt": 0}


def test_adapters_are_trained_and_served_with_the_threshold(world, tmp_path):
    output = tmp_path / "lora"
    run(world.flags("skip", output, *AUTO, "--lora_enable", "True", "--lora_r", "4", "--max_steps", "2"))
    _, model, processor, _ = load_pretrained_model(str(output), str(world.llm), "llava_lora", device="cpu")
    assert model.config.skip_vision.retained_threshold == block_of(output)["retained_threshold"]
    assert all(2 <= count <= 8 for count in counts_on(model, processor, world))


def test_the_memory_plan_is_that_of_images_that_retain_the_most(world, tmp_path, capsys):
    peaks = {}
    for name, budget in {
        "auto": [*AUTO, "--sv_num_skipped", "5"],
        "most": ["--sv_num_retained", "8", "--sv_num_skipped", "1"],
        "mean": ["--sv_num_retained", "4", "--sv_num_skipped", "5"],
    }.items():
        path = tmp_path / f"{name}.json"
        flags = world.flags("skip", tmp_path / "out", *budget)
        assert cli.main(["doctor", "--plan", *flags, "--gpu_memory", "16", "--json", str(path)]) == 0
        peaks[name] = json.loads(path.read_text())
    capsys.readouterr()
    assert peaks["auto"]["rows"] == peaks["most"]["rows"]
    assert peaks["auto"]["rows"] != peaks["mean"]["rows"]


def test_data_without_images_says_that_there_is_nothing_to_fit(world, tmp_path, capsys):
    records = [one for one in json.loads((world.data / "sft.json").read_text()) if "image" not in one]
    path = tmp_path / "text.json"
    path.write_text(json.dumps(records))
    assert train.main(world.flags("skip", tmp_path / "out", *AUTO, "--data_path", str(path))) == 2
    assert "num_retained auto is fitted to the training images, and no record has one; give" in capsys.readouterr().err


def test_pictures_none_of_which_can_be_read_are_named(world, tmp_path, capsys):
    records = json.loads((world.data / "sft.json").read_text())
    for number, record in enumerate(records):
        if "image" in record:
            record["image"] = f"lost-{number}.png"
    path = tmp_path / "lost.json"
    path.write_text(json.dumps(records))
    flags = world.flags("skip", tmp_path / "out", *AUTO, "--data_path", str(path), "--missing_images", "skip")
    assert train.main(flags) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "none of 12 records looked at has one that can be read; check --image_folder" in said


@pytest.mark.parametrize("given", [{"num_retained": 3}, {"num_retained": 3, "num_skipped": 6}])
def test_analyses_take_a_fixed_budget_instead(trained, world, given):
    parser = make_parser("x", "x", "x")
    add_budget_flags(parser)
    flags = [word for name, count in given.items() for word in (f"--{name.replace('_', '-')}", str(count))]
    where = ["--model-path", str(trained[0]), "--image-folder", str(world.data / "images"), "--device", "cpu"]
    job = open_skipping(parser.parse_args([*where, *flags]))
    assert (job.model.config.skip_vision.num_retained, job.model.config.skip_vision.adaptive) == (3, False)
    made = config_at(read_checkpoint(str(trained[0]), may_be_dense=True), Asked(3, 6)).skip_vision
    assert (made.num_retained, made.num_skipped, made.retained_mean) == (3, 6, None)


def test_hd_takes_half_the_overview_by_default(world, tmp_path):
    output = tmp_path / "hd"
    flags = ["--mm_family", "llava_hd", "--sv_num_retained", "auto", "--model_max_length", "256"]
    run(world.flags("sft", output, *flags, "--max_steps", "1"))
    block = block_of(output)
    assert (block["retained_mean"], block["retained_min"], block["retained_max"]) == (8, 4, 16)
    assert block["num_skipped"] == 16
    assert 0 < block["retained_threshold"] < 1
    skip = read_config(str(output)).skip_vision
    assert choose_counts(torch.rand(3, 16), skip).max() <= 16


@pytest.mark.slow
def test_two_processes_under_zero_3_find_what_one_finds(world, tmp_path):
    pytest.importorskip("deepspeed")
    data = ranks.mixed_records(tmp_path / "data")
    flags = ["--data_path", str(data), "--image_folder", str(data.parent / "images"), "--max_steps", "3"]
    flags += [*SKIPPING["llava"], *AUTO]
    run(world.flags("skip", tmp_path / "one", *flags, "--per_device_train_batch_size", "4"))
    two = world.flags("skip", tmp_path / "two", *flags, "--deepspeed", "scripts/zero3.json")
    ranks.run_jobs(tmp_path / "jobs", [{"name": "two", "argv": two}])
    one, both = (block_of(tmp_path / name)["retained_threshold"] for name in ("one", "two"))
    assert one == pytest.approx(both, rel=1e-6)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-5)
