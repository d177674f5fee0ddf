"""`analyze tradeoff --reports`: what each kind of report tells, and reports that tell too little."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llava_sv import cli

SHARES = {"colour": 0.9, "fine_detail": 0.2}
TIMING = {"time_to_first_token_ms": 6.0, "decode_ms_per_token": 2.0, "kv_bytes": 2048}
MODEL = {"accuracy": 0.5, "per_category": SHARES, "train_seconds": 120.0, "timing": TIMING}
QUICKSTART = {
    "dense": MODEL,
    "skip": {**MODEL, "accuracy": 0.75, "train_seconds": 60.0, "timing": {**TIMING, "kv_bytes": 1024}},
    "exact_flops_ratio": 0.7,
    "questions": 40,
    "chance": {"accuracy": 0.25},
    "visual_tokens": {"dense": 64, "retained": 16, "skipped": 20, "summaries": 2},
}
FAMILY = {"accuracy": 0.6, "per_category": SHARES, "train_seconds": 30.0, "visual_tokens": {"total": 64}}
FAMILIES = {
    "models": {
        "plain": {**FAMILY, "skipping": False},
        "hd": {**FAMILY, "skipping": True, "exact_ratio": 0.5, "prefill_flops": 2e9},
    },
    "fine_detail": {},
}
ROW = {
    "row": "6",
    "accuracy": {"mean": 0.4},
    "per_category": {"colour": {"mean": 0.4}},
    "visual_tokens": {"retained": 4, "fine": 2, "skipped": 5, "summaries": 2},
    "kv_bytes": 512,
    "train_seconds": 90.0,
}
ABLATION = {"rows": [ROW, {**ROW, "row": "7", "kv_bytes": None, "train_seconds": 45.0}], "paper_overall": ""}
GROUPS = {"all": {"accuracy": 0.3}, "fine_detail": {"accuracy": 0.1}}
BUDGET = {"accuracy": 0.3, "groups": GROUPS, "prefill_flops": 1e9, "flops_ratio": None, "kv_bytes": 256.0}
TRADEOFF = {"rows": [{**BUDGET, "budget": "4/8", "visual_tokens": 14}], "trained_with": None}


def run(tmp_path, reports, *more):
    files = []
    for name, report in reports.items():
        files.append(tmp_path / name / "report.json")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(report if isinstance(report, str) else json.dumps(report))
    flags = ["--reports", *map(str, files), "--output", str(tmp_path / "out"), *more]
    return cli.main(["analyze", "tradeoff", *flags])


def test_every_kind_of_report(tmp_path, capsys):
    reports = {"quick": QUICKSTART, "families": FAMILIES, "ablation": ABLATION, "one": TRADEOFF}
    assert run(tmp_path, reports) == 0
    told = json.loads((tmp_path / "out" / "tradeoff.json").read_text())["reports"]
    points = {(report, point["name"]): point for report, found in told.items() for point in found["points"]}
    expected = {
        ("quick", "dense"): (0.5, 0.2, {"flops_ratio": 1.0, "train_seconds": 120.0, "time_to_first_token_ms": 6.0,
                             "decode_ms_per_token": 2.0, "kv_bytes": 2048, "visual_tokens": 64}),
        ("quick", "skip"): (0.75, 0.2, {"flops_ratio": 0.7, "train_seconds": 60.0, "time_to_first_token_ms": 6.0,
                            "decode_ms_per_token": 2.0, "kv_bytes": 1024, "visual_tokens": 38}),
        ("families", "plain"): (0.6, 0.2, {"flops_ratio": 1.0, "train_seconds": 30.0, "visual_tokens": 64}),
        ("families", "hd"): (0.6, 0.2, {"prefill_flops": 2e9, "flops_ratio": 0.5, "train_seconds": 30.0,
                             "visual_tokens": 64}),
        ("ablation", "6"): (0.4, None, {"train_seconds": 90.0, "kv_bytes": 512, "visual_tokens": 11}),
        ("ablation", "7"): (0.4, None, {"train_seconds": 45.0, "visual_tokens": 11}),
        ("one", "4/8"): (0.3, 0.1, {"prefill_flops": 1e9, "kv_bytes": 256.0, "visual_tokens": 14}),
    }  # fmt: skip
    assert {key: (p["accuracy"], p["fine_detail"], p["costs"]) for key, p in points.items()} == expected
    arrays = np.load(tmp_path / "out" / "tradeoff.npz")
    assert arrays["accuracy"].tolist() == [0.5, 0.75, 0.6, 0.6, 0.4, 0.4, 0.3]
    assert arrays["kv_bytes"][:2].tolist() == [2048, 1024]
    assert np.isnan(arrays["kv_bytes"][2])
    assert (tmp_path / "out" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert [told[name]["questions"] for name in ("quick", "one")] == [40, None]
    assert told["quick"]["chance"] == 0.25
    captured = capsys.readouterr()
    assert "note: the reports are of different questions" in captured.err
    assert "quick skip: 75.0%; FLOPs of a prefill, % of the same family dense 70, training, minutes 1" in (captured.out)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"steps": []}, "not a report that this knows; it reads the quickstart's report.json, the families' report"),
        ([1], "not a report that this knows"),
        ({**QUICKSTART, "skip": {}}, "the quickstart's report.json without what is needed ('timing'); make it anew"),
        ({**TRADEOFF}, "no cost that two of their models tell and that differs; add a report"),
        ("{", "not JSON"),
    ],
)
def test_reports_that_cannot_be_drawn(report, said, tmp_path, capsys):
    assert run(tmp_path, {"it": report}) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert said in line, line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_absent_and_doubled_reports(tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert cli.main(["analyze", "tradeoff", "--reports", str(tmp_path / "none.json"), *output]) == 2
    assert "none.json" in capsys.readouterr().err
    file = tmp_path / "report.json"
    file.write_text(json.dumps(QUICKSTART))
    assert cli.main(["analyze", "tradeoff", "--reports", str(file), str(file), *output]) == 2
    assert "error: --reports: one file is there twice; drop one" in capsys.readouterr().err


def test_reports_of_one_name_in_folders_of_one_name(tmp_path):
    files = [tmp_path / run / "families" / "report.json" for run in ("one", "two")]
    for file, report in zip(files, (QUICKSTART, FAMILIES)):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(report))
    argv = ["analyze", "tradeoff", "--reports", *map(str, files), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    told = json.loads((tmp_path / "out" / "tradeoff.json").read_text())["reports"]
    assert {label: len(report["points"]) for label, report in told.items()} == {str(files[0]): 2, str(files[1]): 2}


def test_a_report_is_not_replaced_by_what_is_drawn_of_it(tmp_path, capsys):
    file = tmp_path / "tradeoff.json"
    file.write_text(json.dumps(TRADEOFF))
    argv = ["analyze", "tradeoff", "--reports", str(file), "--output", str(tmp_path), "--overwrite"]
    assert cli.main(argv) == 2
    assert "would replace a report that is read; name another folder" in capsys.readouterr().err
    assert json.loads(file.read_text()) == TRADEOFF
