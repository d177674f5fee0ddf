"""Ablation: the paper's rows and their flags, shared trainings, rows of one's own, the table by hand, going on."""

from __future__ import annotations

import json
import statistics

import pytest
from PIL import Image

from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.eval import ablation, ablation_report, ablation_rows
from llava_sv.eval.ablation_rows import BENCHMARKS, SWITCHES, TABLES, choose_rows, known_rows, own_row
from llava_sv.train.flags import parse

KNOWN = known_rows("cos")


def on(key):
    """Table 6's columns that are checked in a row."""
    return {short for short, is_on in KNOWN[key].switches.items() if is_on}


def overall(key):
    return KNOWN[key].paper.scores["overall"]


def test_table_6_is_consistent_with_what_the_paper_says_about_it():
    marks_in_print = [0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 6]
    assert [len(on(str(row))) for row in range(12)] == marks_in_print
    for without, with_it, switch in [
        *((a, b, "Merge") for a, b in ((0, 1), (4, 7), (6, 8))),
        *((a, b, "FS") for a, b in ((4, 6), (7, 8), (9, 10))),
        *((a, b, "LV") for a, b in ((2, 3), (4, 5), (7, 9), (8, 10))),
        *((a, b, "LS") for a, b in ((2, 4), (3, 5))),
        (10, 11, "SK"),
    ]:
        assert on(str(with_it)) - on(str(without)) == {switch}
        assert on(str(without)) < on(str(with_it))
    assert overall("4") > overall("3"), "a summary does better as the last token than a visual token"
    assert overall("1") < overall("0"), "merging alone costs"
    assert overall("8") > overall("6"), "merging skipped tokens does not"


@pytest.mark.parametrize("family", ablation_rows.FAMILIES)
def test_overall_is_the_mean_of_all_but_mme(family):
    for row in known_rows(family).values():
        scores = row.paper.scores
        assert tuple(scores) == BENCHMARKS
        assert statistics.fmean(list(scores.values())[1:-1]) == pytest.approx(scores["overall"], abs=0.1), row.key


def test_scores_of_some_rows():
    assert (KNOWN["2"].paper.scores["OCRB"], KNOWN["11"].paper.scores["TextVQA"]) == (36.5, 63.7)
    assert KNOWN["middle+small"].paper.scores["overall"] == 42.4
    for family, pair in {"llava": (41.1, 41.3), "llava_hd": (43.7, 43.5), "cos": (45.9, 46.0)}.items():
        rows = choose_rows(family, "table4", [])
        assert tuple(row.paper.scores["overall"] for row in rows) == pair


@pytest.mark.parametrize("key", KNOWN)
def test_a_rows_flags_are_its_switches(key):
    row = KNOWN[key]
    block = parse([*row.flags(), "--use_cpu", "True", "--output_dir", "x"])[0].skip_vision()
    if key == "0":
        assert (row.flags(), block, row.kv) == ([], None, "none")
        return
    assert {short for short, name in SWITCHES.items() if block[name]} == on(key) - {"SK"}
    assert set(block) == set(SWITCHES.values())
    assert row.kv == {"11": "skipped", "sk": "skipped", "middle+small": "fine+skipped"}.get(key, "none")


def test_merging_alone_skips_nothing():
    flags = KNOWN["1"].flags()
    assert flags[flags.index("--sv_skip_ffn") + 1] == "False"
    assert flags[flags.index("--sv_merge") + 1] == "True"


def test_rows_that_share_a_training():
    shared = {KNOWN[key].training for key in ("10", "11", "middle+small", "no-sk", "sk")}
    assert shared == {"sf-fs-ls-merge-lv"}
    assert len({row.training for row in KNOWN.values()}) == 11
    assert own_row("mine: kv=none", KNOWN).training == KNOWN["8"].training


def test_choosing_rows():
    def keys(family, wanted, own=()):
        return [row.key for row in choose_rows(family, wanted, list(own))]

    assert keys("cos", None) == [*TABLES["table6"], "middle+small"]
    assert keys("llava", None) == list(TABLES["table6"])
    assert keys("cos", "table7") == ["10", "middle+small", "11"]
    assert keys("cos", "0,2 11,0", ["a: dense"]) == ["0", "2", "11", "a"]
    assert keys("cos", "", ["a: dense"]) == ["a"]


def test_rows_of_ones_own():
    row = own_row("upper half: like=11 sv_skip_layers=2-3,5 sv_selection=cls_attention kv=none num_retained=9", KNOWN)
    assert row.kv == "none"
    assert row.extras == {"skip_layers": "2-3,5", "selection": "cls_attention", "num_retained": 9}
    assert row.switches == KNOWN["10"].switches
    assert row.training == "sf-fs-ls-merge-lv_num_retained-9_selection-cls_attention_skip_layers-2-3.5"
    block = parse([*row.flags(), "--use_cpu", "True", "--output_dir", "x"])[0].skip_vision()
    assert (block["skip_layers"], block["num_retained"], block["last_visual_ffn"]) == ("2-3,5", 9, True)
    assert own_row("a: merge=false", KNOWN).switches == KNOWN["6"].switches | {"SK": True}
    assert own_row("a: dense", KNOWN).settings is None
    auto = own_row("a: num_retained=auto retained_mean=16 retained_threshold=0.7", KNOWN).extras
    assert auto == {"num_retained": "auto", "retained_mean": 16, "retained_threshold": 0.7}


@pytest.mark.parametrize(
    ("family", "rows", "own", "message"),
    [
        ("pixtral", None, [], "FAMILY=pixtral: unknown family; known: llava, llava_hd, cos"),
        ("cos", "0,12", [], "unknown row '12'; known: table4, table6, table7, 0, 1"),
        ("cos", " , ", [], "names no rows"),
        (
            "llava",
            "table7",
            [],
            "row 'middle+small': skip_kv 'fine+skipped' drops a middle scale, and family 'llava' has none",
        ),
        ("llava_hd", "0", ["a: kv=fine+skipped"], "family 'llava_hd' has none"),
        ("cos", "0", ["a"], "begin with a name"),
        ("cos", "0", ["11: dense"], "begin with a name"),
        ("cos", "0", ["a: dense", "a: dense"], "there is a row 'a' already"),
        ("cos", "0", ["a: merge"], "cannot read 'merge'"),
        ("cos", "0", ["a: merge=maybe"], "merge is True or False, got 'maybe'"),
        ("cos", "0", ["a: rank=3"], "unknown setting 'rank'; known: skip_ffn"),
        ("cos", "0", ["a: kv=most"], "unknown level 'most'"),
        ("cos", "0", ["a: like=0"], "no skipping row '0' to be like"),
        ("cos", "0", ["a: num_retained=many"], "num_retained: expected a whole number"),
        ("llava", "0", ["a: retained_mean=9"], "retained_mean goes with num_retained 'auto', not with 100"),
        (
            "llava",
            "0",
            ["a: num_retained=auto retained_threshold=most"],
            "retained_threshold is a share between 0 and 1",
        ),
        ("cos", "0", ["a: skip_layers=upper"], "cannot read 'upper'"),
        ("cos", "0", ["a: selection=random"], "random"),
    ],
)
def test_bad_rows(family, rows, own, message):
    with pytest.raises(UserError) as caught:
        choose_rows(family, rows, own)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", ""], "SEEDS: expected whole numbers"),
        (["--seeds", "1 b"], "SEEDS: expected whole numbers"),
        (["--max-steps", "0"], "MAX_STEPS: expected a whole number"),
        (["--sv_merge", "False"], "--sv_merge: the ablation sets this flag itself"),
        (["--output-dir=here"], "--output-dir=here: the ablation sets this flag itself"),
        (["--task", "vqa"], "TASK=vqa: name the benchmark"),
        (["--preset", ""], "TASK=: name the benchmark"),
        (["10"], "unexpected '10'"),
        (["--eval-flags=--blnd"], "EVAL_FLAGS: llava-sv eval has no '--blnd'"),
    ],
)
def test_bad_arguments_run_nothing(argv, message, tmp_path, capsys):
    given = ["--family", "llava", "--preset", "tiny", "--output", str(tmp_path / "out"), *argv]
    assert exit_on_user_error(ablation.main, given) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- the plan


def request_of(tmp_path, *argv):
    given = ["--family", "llava", "--preset", "tiny", "--output", str(tmp_path), *argv]
    args, further = ablation.build_parser().parse_known_args(given)
    return ablation.read_request(args, further)


def test_the_plan_does_each_thing_once(tmp_path):
    names = [step.name for step in ablation.plan(request_of(tmp_path, "--rows", "0,10,11,sk", "--seeds", "1 2"))]
    trained = "sf-fs-ls-merge-lv"
    one = ["pretrain", "train/dense", "eval/dense.none", f"train/{trained}", f"eval/{trained}.none"]
    one += [f"eval/{trained}.skipped"]
    assert names == ["data", *(f"seed{seed}/{name}" for seed in (1, 2) for name in one)]


def test_an_adapter_spares_the_pretraining(tmp_path):
    request = request_of(
        tmp_path, "--rows", "0", "--seeds", "1", "--adapter", "a.bin", "--max-steps", "3", "--tf32", "0"
    )
    _, train, _ = ablation.plan(request)
    assert train.env["ADAPTER"] == "a.bin"
    assert train.command == ["bash", "scripts/v1_5/finetune.sh", "--max_steps", "3", "--tf32", "0"]


def test_pretraining_has_variables_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "sft.json")
    monkeypatch.setenv("LR", "5")
    monkeypatch.setenv("PRETRAIN_DATA", "captions.json")
    monkeypatch.setenv("PER_DEVICE_BATCH", "2")
    monkeypatch.setenv("HD_MAX_TILES", "9")
    pretrain, train, _ = ablation.plan(request_of(tmp_path, "--rows", "0", "--seeds", "1"))
    assert pretrain.environment()["DATA"] == "captions.json"
    assert "LR" not in pretrain.environment()
    assert (train.environment()["DATA"], train.environment()["LR"]) == ("sft.json", "5")
    assert pretrain.environment()["PER_DEVICE_BATCH"] == "2"
    assert (pretrain.environment().get("HD_MAX_TILES"), train.environment()["HD_MAX_TILES"]) == (None, "9")
    monkeypatch.setenv("PRETRAIN_HD_MAX_TILES", "4")
    pretrain, *_ = ablation.plan(request_of(tmp_path, "--rows", "0", "--seeds", "1"))
    assert pretrain.environment()["HD_MAX_TILES"] == "4"


# ---- stopping and going on


def test_an_output_that_is_no_folder_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    given = ["--family", "llava", "--preset", "tiny", "--rows", "0", "--output", str(tmp_path / "out")]
    assert exit_on_user_error(ablation.main, given) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_end_in_a_report_and_are_not_run_twice(tmp_path, monkeypatch, skip_checkpoint, dense_checkpoint, capsys):
    request, done = request_of(tmp_path, "--rows", "0,10,11", "--seeds", "1 2"), []

    def execute(step, log):
        done.append(step.name)
        step.product.parent.mkdir(parents=True, exist_ok=True)
        if step.kind == "eval":
            step.product.write_text(json.dumps(evaluation(0.5)))
        elif step.kind == "train":
            step.product.symlink_to(dense_checkpoint if "dense" in step.name else skip_checkpoint)
        else:
            step.product.mkdir()
        if step.name == stop_at:
            raise UserError("stopped")
        return 60.0

    monkeypatch.setattr(ablation, "execute", execute)
    steps = ablation.plan(request)
    names, stop_at = [step.name for step in steps], "seed2/train/dense"
    with pytest.raises(UserError, match="stopped"):
        ablation.run(request, steps)
    assert json.loads((tmp_path / "ablation.json").read_text())["seeds"] == [1], "the seeds so far"
    at, stop_at = names.index(stop_at), ""
    assert done == names[: at + 1]
    done.clear()
    (tmp_path / "seed2/train/dense").unlink()
    ablation.run(request, steps)
    assert done == names[at:]
    said = capsys.readouterr().out
    assert f"{names[-1]} ... (step {len(names)} of {len(names)}, rows done 5 of 6, about 1 min left)" in said
    assert "rows done 6 of 6\n" in said
    assert json.loads((tmp_path / "ablation.json").read_text())["seeds"] == [1, 2]
    done.clear()
    ablation.run(request, steps)
    assert done == []
    stop_at = "seed2/train/dense"
    (tmp_path / stop_at).unlink()
    with pytest.raises(UserError, match="stopped"):
        ablation.run(request, steps)
    assert json.loads((tmp_path / "ablation.json").read_text())["seeds"] == [1], "a checkpoint of seed 2 is lost"


# ---- the table


def evaluation(accuracy, fine=0.25, kv_bytes=2048):
    return {
        "accuracy": accuracy,
        "per_category": {"colour": accuracy, "fine_detail": fine},
        "questions": 100,
        "chance": {"accuracy": 0.2},
        "timing": {"kv_bytes": kv_bytes, "kv_bytes_prefill": 4096},
    }


@pytest.fixture
def made(tmp_path, dense_checkpoint, skip_checkpoint):
    rows = choose_rows("llava", "0,11", ["mine: like=11 skip_layers=1"])
    shares = {"0": (0.5, 0.6, 0.7), "11": (0.4, 0.4, 0.7), "mine": (0.6, 0.6, 0.6)}
    sources = {}
    for row in rows:
        for seed, share in enumerate(shares[row.key], start=1):
            path = tmp_path / f"{row.key}-{seed}.json"
            path.write_text(json.dumps(evaluation(share, fine=share / 2)))
            sources[row.key, seed] = (path, dense_checkpoint if row.key == "0" else skip_checkpoint)
    about = {"family": "llava", "preset": "tiny", "task": "toy", "seeds": [1, 2, 3], "data_seed": 1}
    return tmp_path, rows, sources, about


def test_means_and_spreads_by_hand(made):
    folder, rows, sources, about = made
    report = ablation_report.write_report(folder, rows, sources, about)
    assert report == json.loads((folder / "ablation.json").read_text())
    dense, skip, mine = report["rows"]
    assert dense["accuracy"]["mean"] == pytest.approx(0.6)
    assert dense["accuracy"]["spread"] == pytest.approx(0.1)
    assert skip["accuracy"]["mean"] == pytest.approx(0.5)
    assert skip["accuracy"]["spread"] == pytest.approx(0.03**0.5)  # (0.01 + 0.01 + 0.04) / 2
    assert skip["accuracy"]["seeds"] == {"1": 0.4, "2": 0.4, "3": 0.7}
    assert mine["per_category"]["fine_detail"]["mean"] == pytest.approx(0.3)
    assert dense["visual_tokens"] == {"retained": 16, "fine": 0, "skipped": 0, "summaries": 0}
    assert skip["visual_tokens"] == {"retained": 4, "fine": 0, "skipped": 5, "summaries": 2}
    assert (skip["kv_bytes"], skip["kv_bytes_prefill"], skip["train_seconds"]) == (2048, 4096, 10.0)
    assert (skip["paper"]["overall"], mine["paper"]) == (46.0, None)
    page = (folder / "ablation.md").read_text()
    assert "| 0 |  |  |  |  |  |  | 16 | 2 | 60.0 ± 10.0 | 30.0 ± 5.0 | 46.0 | 64.4 | 39.2 | Table 6, CoS |" in page
    assert "| 11 | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | 4 + 5 + 2 | 2 | 50.0 ± 17.3 | 25.0 ± 8.7 | 46.0 | 63.7 | 37.0 |" in page
    assert "| mine (skip_layers=1) |" in page
    assert "Rows lie 10.0 points apart; a row's own spread is 17.3 points at most over seeds, and 100 questions" in page
    with Image.open(folder / "ablation.png") as chart:
        assert chart.width > 1000


def test_a_row_whose_images_decide_shows_what_they_retained(made):
    folder, rows, sources, about = made
    for seed, mean in ((1, 4.5), (2, 4.0), (3, 4.7)):
        path = sources["mine", seed][0]
        path.write_text(json.dumps({**json.loads(path.read_text()), "retained": {"mean": mean}}))
    report = ablation_report.write_report(folder, rows, sources, about)
    assert report["rows"][2]["retained"]["mean"] == pytest.approx(4.4)
    assert report["rows"][1]["retained"] is None
    assert " | 4.4 + 4.6 + 2 | " in (folder / "ablation.md").read_text()


def test_results_of_other_questions_or_lost_ones_are_refused(made):
    folder, rows, sources, about = made
    path = sources["11", 2][0]
    text = path.read_text()
    for other in ({"questions": 99}, {"chance": {"accuracy": 0.25}}):
        path.write_text(json.dumps({**json.loads(text), **other}))
        with pytest.raises(UserError, match=r"11-2\.json: other questions than .*0-1\.json"):
            ablation_report.build(rows, sources, about)
    path.unlink()
    with pytest.raises(UserError, match=r"no such file: .*11-2\.json; run bash scripts/ablation\.sh"):
        ablation_report.build(rows, sources, about)
    path.write_text(text)
    lost = folder / "lost"
    sources["11", 1] = (sources["11", 1][0], lost)
    with pytest.raises(UserError) as caught:
        ablation_report.build(rows, sources, about)
    assert "quickstart" not in str(caught.value)
    assert f"run bash scripts/ablation.sh again without {lost}" in str(caught.value)


def test_one_seed_and_no_fine_detail(made):
    folder, rows, sources, about = made
    for path, _ in sources.values():
        result = json.loads(path.read_text())
        del result["per_category"]["fine_detail"], result["timing"]
        path.write_text(json.dumps(result))
    report = ablation_report.write_report(folder, rows, sources, {**about, "seeds": [2]})
    assert report["rows"][0]["accuracy"] == {"seeds": {"2": 0.6}, "mean": 0.6, "spread": None}
    page = (folder / "ablation.md").read_text()
    assert "| 0 |  |  |  |  |  |  | 16 | - | 60.0 | 46.0 |" in page
    assert "fine detail" not in page
    assert "not known from one seed" in page
