"""`analyze tradeoff` on one checkpoint: each budget against a copy of the checkpoint whose config.json says it, asked
by `llava-sv eval` and counted by `llava-sv flops`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from llava_sv import cli
from llava_sv.analysis import tradeoff
from llava_sv.data import toy
from llava_sv.eval import answer_loop
from llava_sv.eval.tasks import get_task
from llava_sv.eval.tasks.base import Question
from llava_sv.generation import Assistant, load_for_inference, make_batch, user_turn
from llava_sv.mm_utils import load_image
from tests.analysis.families import save_family

CASES = {
    "llava": ("llava", True, {}, ["3/2", "4/5", "4/12", "dense"]),
    "llava dense": ("llava", False, {}, ["dense", "2/7"]),
    "llava, last visual, one layer": ("llava", True, {"last_visual_ffn": True, "skip_layers": [1]}, ["2/7", "dense"]),
    "llava, by content": (
        "llava",
        True,
        {"num_retained": "auto", "retained_mean": 4, "retained_threshold": 0.4},
        ["3/2", "dense"],
    ),
    "llava_hd": ("llava_hd", True, {}, ["3/5", "16/7", "dense"]),
    "cos": ("cos", True, {}, ["16/4", "20/6", "dense"]),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    assert toy.main(["--output", str(folder), "--train", "2", "--bench", "12", "--fine-bench", "6"]) == 0
    return folder


def flags_of(checkpoint, bench, output, budgets, *more):
    flags = ["--model-path", str(checkpoint), "--data-path", str(bench), "--budgets", ",".join(budgets)]
    return ["analyze", "tradeoff", *flags, "--output", str(output), "--device", "cpu", "--batch-size", "5", *more]


def texts_of(path):
    return {row["question_id"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def edited(checkpoint, folder, budget):
    """A copy whose config.json says `budget`; where a dense one is to skip, summary weights of zero come along."""
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / "config.json").read_text())
    if budget == "dense":
        values["skip_vision"] = None
    else:
        retained, skipped = map(int, budget.split("/"))
        block = {name: value for name, value in (values["skip_vision"] or {}).items() if "retained_" not in name}
        values["skip_vision"] = {**block, "num_retained": retained, "num_skipped": skipped}
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    summaries = [f"model.mm_projector.summary.{end}.weight" for end in ("former", "latter")]
    for name in summaries:
        if budget == "dense":
            weights.pop(name, None)
        elif name not in weights:
            weights[name] = weights["model.norm.weight"] * 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def flops_by_command(checkpoint, side, text, size, family, tmp_path):
    """FLOPs of one prompt's prefill as `llava-sv flops` counts them."""
    file = tmp_path / "flops.json"
    flags = ["--model-path", str(checkpoint), "--text-tokens", str(text), "--json", str(file), "--overwrite"]
    if side == "dense":
        flags += ["--num-retained", "1", "--num-skipped", "1"]
    if family == "llava_hd":
        flags += ["--image-size", f"{size[0]}x{size[1]}"]
    assert cli.main(["flops", *flags]) == 0
    return json.loads(file.read_text())[side]["prefill"]["total"]


@pytest.mark.parametrize("case", CASES)
def test_each_budget_as_a_checkpoint_of_its_own(case, bench, tmp_path):
    family, skips, switches, budgets = CASES[case]
    checkpoint = save_family(tmp_path / "model", family, skips, **switches)
    assert cli.main(flags_of(checkpoint, bench, tmp_path / "out", budgets)) == 0
    report = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert [row["budget"] for row in report["rows"]] == budgets
    questions = get_task("toy").load(bench)
    answered = {}
    for row in report["rows"]:
        budget = row["budget"]
        copy = edited(checkpoint, tmp_path / budget.replace("/", "-"), budget)
        result = tmp_path / "eval.json"
        flags = ["--model-path", str(copy), "--task", "toy", "--data-path", str(bench), "--json", str(result)]
        assert cli.main(["eval", *flags, "--device", "cpu", "--batch-size", "5"]) == 0
        scored = json.loads(result.read_text())
        name = budget.replace("/", "-")
        answered[budget] = texts_of(tmp_path / "out" / "tradeoff-answers" / f"{name}.answers.jsonl")
        assert answered[budget] == texts_of(tmp_path / "eval.answers.jsonl")
        assert (row["accuracy"], row["per_category"]) == (scored["accuracy"], scored["per_category"])

        assistant = load_for_inference(str(copy), device="cpu")
        config, side = assistant.model.config, "dense" if budget == "dense" else "skip"
        flops, held = [], []
        for question in questions:
            image = load_image(question.images[0])
            batch = make_batch(assistant, [[user_turn(question.text, 1)]], [[image]])
            text = batch.input_ids.shape[1] - 1
            flops.append(flops_by_command(copy, side, text, image.size, family, tmp_path))
            roles = assistant.model.encode_images(batch.images, batch.image_sizes)[0].roles
            held.append(text + int((roles != 5).sum()))
        assert row["prefill_flops"] == pytest.approx(np.mean(flops))
        a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * 8 * 4
        assert row["kv_bytes"] == pytest.approx(a_token * np.mean(held[:: len(held) // 4][:4]))
    assert len({json.dumps(texts) for texts in answered.values()}) == len(budgets)
    dense = next(row for row in report["rows"] if row["budget"] == "dense")
    assert (dense["flops_ratio"], dense["kv_ratio"]) == (1.0, 1.0)
    for row in report["rows"]:
        assert row["flops_ratio"] == pytest.approx(row["prefill_flops"] / dense["prefill_flops"])
        assert row["kv_ratio"] == pytest.approx(row["kv_bytes"] / dense["kv_bytes"])
    fixed = skips and "num_retained" not in switches
    own = {"llava": "4/5", "llava_hd": "16/7", "cos": "20/6"}[family] if fixed else "none" if skips else "dense"
    assert [row["budget"] for row in report["rows"] if row["trained_so"]] == [own] * (own in budgets)


def test_a_stopped_run_goes_on_and_other_questions_are_asked_anew(skip_checkpoint, bench, tmp_path, monkeypatch):
    asked, room = [], [23]  # 18 questions of one budget, and a batch of the next
    answer = answer_loop.answer_batch

    def counting(assistant, task, batch, *rest):
        if len(asked) + len(batch) > room[0]:
            raise KeyboardInterrupt
        asked.extend(question.id for question in batch)
        return answer(assistant, task, batch, *rest)

    monkeypatch.setattr(answer_loop, "answer_batch", counting)
    output = tmp_path / "out"
    argv = flags_of(skip_checkpoint, bench, output, ["2/3", "4/5"])
    assert cli.main(argv) == 130
    assert (len(asked), (output / "tradeoff.json").exists()) == (23, False)
    asked.clear()
    assert cli.main(argv) == 0
    assert len(asked) == 13
    first = (output / "tradeoff.json").read_text()
    asked.clear()
    assert cli.main(argv) == 2  # what is there is kept
    assert cli.main([*argv, "--overwrite"]) == 0
    assert asked == []
    assert (output / "tradeoff.json").read_text() == first
    assert cli.main([*argv, "--overwrite", "--limit", "4"]) == 0
    assert len(asked) == 8


def test_fine_detail_apart():
    questions = [
        Question(str(i), (), "?", category, "yes") for i, category in enumerate(["colour"] * 3 + ["fine_detail"])
    ]
    task = get_task("toy")
    groups = tradeoff.grouped(task, questions, {"0": "Yes.", "1": "no", "2": "yes", "3": "no"})["groups"]
    assert {name: (one["accuracy"], one["questions"]) for name, one in groups.items()} == {
        "all": (0.5, 4), "others": (2 / 3, 3), "fine_detail": (0.0, 1)
    }  # fmt: skip
    assert groups["all"]["standard_error"] == 0.25
    assert list(tradeoff.grouped(task, questions[:3], {"0": "yes", "1": "no", "2": "yes"})["groups"]) == ["all"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--budgets": "4"}, "--budgets: cannot read '4'; write RETAINED/SKIPPED, both 1 or more, or dense, such as"),
        ({"--budgets": "4/0"}, "--budgets: cannot read '4/0'"),
        ({"--budgets": "\u00b2/4"}, "--budgets: cannot read '\u00b2/4'"),
        ({"--budgets": "4/5,dense,4/5"}, "--budgets: 4/5 is there twice; drop one"),
        (
            {"--budgets": "4/5,12/9"},
            "--budgets 12/9: skip_vision: num_retained 12 + num_skipped 9 is more than the 16 patches of an image; ",
        ),
        ({"--budgets": None}, "--budgets is missing: RETAINED/SKIPPED,..., such as 8/8,16/20,dense"),
        ({"--model-path": None}, "give either --model-path with --budgets, or --reports"),
        ({"--reports": "x.json"}, "give either --model-path with --budgets, or --reports"),
        (
            {"--reports": "x.json", "--model-path": None},
            "--budgets goes with --model-path; leave it out beside --reports",
        ),
        ({"--task": "exam"}, "--task: unknown"),
        ({"--data-path": "absent"}, "no such file: absent/bench.jsonl"),
        ({"--limit": "0"}, "--limit 0: must be 1 or more"),
        ({"--batch-size": "0"}, "--batch-size 0: must be 1 or more"),
        ({"--skip-kv": "fine+skipped"}, "skip_kv 'fine+skipped' drops a middle scale, and family 'llava' has none"),
    ],
)
def test_what_is_wrong_is_one_line_before_weights_are_loaded(
    changed, said, skip_checkpoint, bench, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tradeoff, "load_for_inference", None)
    flags = {"--model-path": str(skip_checkpoint), "--data-path": str(bench), "--budgets": "4/5"} | changed
    argv = [word for name, value in flags.items() if value is not None for word in (name, value)]
    assert cli.main(["analyze", "tradeoff", "--output", str(tmp_path / "out"), *argv]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {said}"), line
    assert line.count("\n") == 1
    assert not (tmp_path / "out" / "tradeoff.json").exists()


def test_an_absent_checkpoint_and_one_without_an_encoder(skip_checkpoint, tmp_path, bench, capsys, monkeypatch):
    assert cli.main(flags_of("absent", bench, tmp_path / "out", ["4/5"])) == 2
    assert capsys.readouterr().err.startswith("error: no such checkpoint folder: absent; train one, or give")
    monkeypatch.setattr(Assistant, "has_vision", property(lambda self: False))
    assert cli.main(flags_of(skip_checkpoint, bench, tmp_path / "out", ["4/5"])) == 2
    assert "this checkpoint has no vision encoder; name one that has" in capsys.readouterr().err


def test_anyres_skipping_checkpoints_have_no_dense_side(tmp_path, bench, capsys):
    settings = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
    checkpoint = save_family(tmp_path / "model", "llava_hd", settings=settings)
    output = tmp_path / "out"
    assert cli.main(flags_of(checkpoint, bench, output, ["16/7", "dense"])) == 2
    assert "--budgets dense: this checkpoint skips with anyres tiles, and has no newline" in capsys.readouterr().err
    assert cli.main(flags_of(checkpoint, bench, output, ["16/7", "8/4"], "--limit", "2")) == 0
    rows = json.loads((output / "tradeoff.json").read_text())["rows"]
    assert [(row["flops_ratio"], row["kv_ratio"]) for row in rows] == [(None, None)] * 2
    assert rows[0]["prefill_flops"] > rows[1]["prefill_flops"] > 0
    assert cli.main(["analyze", "tradeoff", "--reports", str(output / "tradeoff.json"), "--output", str(tmp_path)]) == 0


def test_a_checkpoint_that_does_not_merge_takes_no_budget(tmp_path, bench, capsys):
    checkpoint = save_family(tmp_path / "model", "llava", merge=False)
    assert cli.main(flags_of(checkpoint, bench, tmp_path / "out", ["4/5"])) == 2
    said = "--budgets 4/5: this checkpoint skips without merging, all that is not retained; drop it"
    assert said in capsys.readouterr().err


def test_fixed_budgets_of_a_checkpoint_whose_budget_follows_the_content(tmp_path, bench):
    auto = {"num_retained": "auto", "retained_mean": 4, "retained_threshold": 0.5}
    checkpoint = save_family(tmp_path / "model", "llava", **auto)
    output = tmp_path / "out"
    assert cli.main(flags_of(checkpoint, bench, output, ["4/5", "dense"], "--limit", "2")) == 0
    report = json.loads((output / "tradeoff.json").read_text())
    assert [(row["budget"], row["trained_so"]) for row in report["rows"]] == [("4/5", False), ("dense", False)]
    fixed = save_family(tmp_path / "fixed", "llava", num_retained=4, num_skipped=5)
    assert report["rows"][0]["prefill_flops"] == prefill_flops_of(fixed, bench, tmp_path / "other")


def prefill_flops_of(checkpoint, bench, output):
    assert cli.main(flags_of(checkpoint, bench, output, ["4/5"], "--limit", "2")) == 0
    return json.loads((output / "tradeoff.json").read_text())["rows"][0]["prefill_flops"]
