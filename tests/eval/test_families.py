"""Families side by side: figures as the files have them, the winner on fine detail, and mistakes said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llava_sv.bench import flops
from llava_sv.errors import exit_on_user_error
from llava_sv.eval import families

CHANCE = {"accuracy": 0.3, "per_category": {"existence": 0.5, "fine_detail": 0.1, "text": 0.0625}}


def result(checkpoint: Path, accuracy: float, fine: float) -> dict:
    return {
        "model_path": str(checkpoint),
        "accuracy": accuracy,
        "per_category": {"existence": accuracy, "fine_detail": fine, "text": 0.75},
        "questions": 36,
        "chance": CHANCE,
    }


@pytest.fixture
def folder(tmp_path, dense_checkpoint, skip_checkpoint):
    """dense.json, skip.json and fine.json, the last of the skipping checkpoint too; flops.json."""
    for name, checkpoint, accuracy, fine in (
        ("dense", dense_checkpoint, 0.9, 0.25),
        ("skip", skip_checkpoint, 0.875, 0.2),
        ("fine", skip_checkpoint, 0.95, 0.8),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(checkpoint, accuracy, fine)))
    argv = ["--model-path", str(skip_checkpoint), "--text-tokens", "8", "--json", str(tmp_path / "flops.json")]
    assert flops.main(argv) == 0
    return tmp_path


def arguments(folder: Path, *names: str) -> list[str]:
    named = [f"{name}={folder / name}.json" for name in names]
    return ["--result", *named, "--output", str(folder / "out")]


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_report_holds_every_figure_and_names_the_winner(folder, skip_checkpoint, capsys):
    argv = [*arguments(folder, "dense", "skip"), f"--result=fine={folder / 'fine.json'}", "--seed", "7"]
    argv += ["--flops", f"skip={folder / 'flops.json'}", "--flops", f"fine={folder / 'flops.json'}"]
    assert families.main(argv) == 0
    page = (folder / "out" / "report.md").read_text()
    assert page.strip() in capsys.readouterr().out
    made = json.loads((folder / "out" / "report.json").read_text())
    counted = json.loads((folder / "flops.json").read_text())

    assert list(made["models"]) == ["dense", "skip", "fine"]
    dense, skip = made["models"]["dense"], made["models"]["skip"]
    assert (dense["accuracy"], dense["train_seconds"], dense["skipping"]) == (0.9, 20.0, False)
    assert dense["visual_tokens"] == {"total": 16, "retained": 16, "skipped": 0, "summaries": 0}
    assert "paper_ratio" not in dense
    assert (skip["checkpoint"], skip["family"], skip["skipping"]) == (str(skip_checkpoint), "llava", True)
    assert skip["visual_tokens"] == {"total": 11, "retained": 4, "skipped": 5, "summaries": 2}
    assert skip["paper_ratio"] == counted["paper_ratio"]
    assert skip["prefill_flops"] == counted["skip"]["prefill"]["total"]
    assert made["chance"] == CHANCE
    assert made["seed"] == 7
    assert made["fine_detail"] == {
        "best": {"name": "fine", "accuracy": 0.8},
        "baseline": {"name": "dense", "accuracy": 0.25},
        "gain_points": 55.0,
    }

    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == "| category | dense | skip | fine | chance |"
    assert rows[2:6] == [
        "| **all** | **90.0%** | **87.5%** | **95.0%** | **30.0%** |",
        "| existence | 90.0% | 87.5% | 95.0% | 50.0% |",
        "| text | 75.0% | 75.0% | 75.0% | 6.2% |",
        "| fine_detail | 25.0% | 20.0% | 80.0% | 10.0% |",
    ]
    assert "fine is best at 80.0%; the baseline, dense, reaches 25.0%: a difference of 55.0 points." in page
    assert "| dense | llava | 16 | 20 s | - | - |" in page
    assert f"| skip | llava | 11 (4 + 5 + 2) | 10 s | 0.00 | {counted['paper_ratio']:.3f} |" in page
    with Image.open(folder / "out" / "report.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_a_baseline_that_none_beats_is_said_to(folder):
    assert families.main([*arguments(folder, "fine", "dense", "skip"), "--baseline", "fine"]) == 0
    made = json.loads((folder / "out" / "report.json").read_text())
    assert made["fine_detail"]["best"] == made["fine_detail"]["baseline"] == {"name": "fine", "accuracy": 0.8}
    assert made["fine_detail"]["gain_points"] == 0
    assert made["seed"] is None
    assert "no model is better than the baseline, fine, at 80.0%" in (folder / "out" / "report.md").read_text()


def test_a_dense_model_shows_its_own_prefill(folder):
    argv = [*arguments(folder, "dense"), f"--flops=dense={folder / 'flops.json'}"]
    assert families.main(argv) == 0
    made = json.loads((folder / "out" / "report.json").read_text())["models"]["dense"]
    assert made["prefill_flops"] == json.loads((folder / "flops.json").read_text())["dense"]["prefill"]["total"]
    assert "paper_ratio" not in made


def refused(argv: list[str], capsys) -> str:
    assert exit_on_user_error(families.main, argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_arguments_that_cannot_be_are_refused_in_one_line(folder, capsys):
    base = arguments(folder, "dense", "skip")
    flops_file = folder / "flops.json"
    for more, message in (
        (["--result", "fine.json"], "--result fine.json: write NAME=FILE"),
        (["--result", "=fine.json"], "--result =fine.json: write NAME=FILE"),
        (["--flops", "skip="], "--flops skip=: write NAME=FILE"),
        (["--result", "skip=fine.json"], "the name 'skip' is given twice"),
        (["--flops", f"hd={flops_file}"], "--flops hd: no --result of that name; known: dense, skip"),
        (["--baseline", "hd"], "--baseline hd: no --result of that name; known: dense, skip"),
    ):
        assert message in refused([*base, *more], capsys)
    assert "--baseline is missing" in refused(arguments(folder, "skip", "fine"), capsys)
    assert not (folder / "out").exists()


def test_files_that_cannot_be_used_are_named(folder, tmp_path, capsys):
    base = arguments(folder, "dense", "skip")
    with_flops = [*base, "--flops", f"skip={folder / 'flops.json'}"]
    skip = folder / "skip.json"
    as_it_was = skip.read_text()

    change(folder / "flops.json", family="cos")
    assert f"{folder / 'flops.json'}: counted for family 'cos'" in refused(with_flops, capsys)
    (folder / "flops.json").unlink()
    assert f"no such file: {folder / 'flops.json'}; run llava-sv flops --model-path" in refused(with_flops, capsys)

    change(skip, questions=35)
    assert f"{skip}: other questions than {folder / 'dense.json'}" in refused(base, capsys)
    change(skip, per_category={"existence": 1.0})
    assert f"{skip}: no category fine_detail" in refused(base, capsys)
    skip.write_text(as_it_was)
    change(skip, model_path=str(tmp_path / "gone"))
    assert f"no such file: {tmp_path / 'gone' / 'train_summary.json'}" in refused(base, capsys)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "train_summary.json").write_text(json.dumps({"train_seconds": 1.0}))
    assert "has no config.json" in refused(base, capsys)
    skip.write_text("[]")
    assert f"{skip}: no field model_path, accuracy" in refused(base, capsys)
    skip.write_text("{,")
    assert f"{skip}, line 1, column 2: not JSON" in refused(base, capsys)
    skip.unlink()
    assert f"no such file: {skip}; run llava-sv eval --task toy --json FILE" in refused(base, capsys)
    assert not (folder / "out").exists()
