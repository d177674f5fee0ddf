"""`bench sweep`: the grid, rows that are never measured twice, the table, break-even points, the picture, refusals."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llava_sv import cli
from llava_sv.bench import clock, flags, room, sweep, sweep_page
from llava_sv.bench.peers import PEER

BASE = ["bench", "sweep", "--size", "tiny", "--dtype", "fp32", "--repeats", "1", "--device", "cpu"]
GRID = ["--text-tokens", "16,64", "--batch", "1,2", "--new-tokens", "4,8"]


def synthetic(what: str, job) -> dict:
    """A report whose times follow a rule: skipping takes 10 ms and half of the dense milliseconds, one a text token."""
    text, dense = job.size.text_tokens, float(job.size.text_tokens)
    shares = {"time_saved": 0.5 - 10 / text, "flops_saved": 0.5, "time_saved_per_flops_saved": 1 - 20 / text}
    report = {**flags.head_of(job), "environment": clock.environment(job.device, job.dtype)}
    times = {"dense": dense, "skip": 10 + dense / 2}
    if what == "train":
        return {**report, "regions": {"model": {**{name: {"step_ms": ms} for name, ms in times.items()}, **shares}}}
    rows = {name: {"prefill_ms": ms, "decode_ms_per_token": ms} for name, ms in times.items()}
    lengths = [{"new_tokens": n, "dense_ms": dense, "skip_ms": times["skip"], **shares} for n in job.new_tokens]
    return {**report, **rows, "regions": {"prefill": shares, "decode": shares}, "lengths": lengths}


@pytest.fixture
def measured(monkeypatch):
    """What was measured, in order: (what, family, batch, text tokens). An entry `stop_after` ends it by Ctrl-C."""
    calls: list[tuple] = []
    stop_after: list[int] = []

    def measure(what):
        def run(job):
            if stop_after and len(calls) == stop_after[0]:
                raise KeyboardInterrupt
            calls.append((what, job.size.family, job.size.batch, job.size.text_tokens))
            return synthetic(what, job)

        return run

    monkeypatch.setattr(sweep, "MEASURES", {name: measure(name) for name in ("train", "infer")})
    # a KiB a sample
    for name in ("of_train", "of_infer"):
        monkeypatch.setattr(room, name, lambda size, *_: room.Estimate({"activations": 1024 * size.batch}))
    return calls, stop_after


def test_the_grid_is_every_combination_once(measured, capsys):
    calls, _ = measured
    assert cli.main([*BASE, *GRID, "--family", "llava,cos"]) == 0
    wanted = [
        (what, family, batch, text)
        for family in ("llava", "cos")
        for batch in (1, 2)
        for text in (16, 64)
        for what in ("train", "infer")
    ]
    assert calls == wanted
    out = capsys.readouterr()
    # a training step, prefill, decode and two lengths each
    assert out.out.count("| tiny |") == out.out.count("| tiny, cos |") == 4 * 5
    assert "16 measured" in out.err


def test_by_default_text_lengths_vary(measured):
    assert cli.main([*BASE, "--what", "train"]) == 0
    assert [text for *_, text in measured[0]] == [8, 16, 64]


def test_a_killed_sweep_measures_nothing_twice(measured, tmp_path, capsys):
    calls, stop_after = measured
    target = tmp_path / "sweep.json"
    argv = [*BASE, *GRID, "--json", str(target), "--markdown", str(tmp_path / "sweep.md")]
    stop_after.append(3)
    assert cli.main(argv) == 130
    assert len(json.loads(target.read_text())["rows"]) == len(calls) == 3
    assert not (tmp_path / "sweep.md").exists()
    stop_after.clear()
    capsys.readouterr()
    assert cli.main(argv) == 0
    assert len(calls) == len(set(calls)) == 8
    assert "5 measured, 3 were there already" in capsys.readouterr().err
    page = (tmp_path / "sweep.md").read_text()
    # and once more: nothing is left to measure, the table is drawn again
    assert cli.main(argv) == 0
    assert len(calls) == 8
    assert (tmp_path / "sweep.md").read_text() == page


@pytest.mark.parametrize("changed", [["--repeats", "2"], ["--dtype", "bf16"], ["--no-peers"], ["--layers", "1"]])
def test_other_settings_are_measured_anew_and_old_rows_stay(changed, measured, tmp_path):
    calls, target = measured[0], tmp_path / "sweep.json"
    argv = [*BASE, "--what", "train", "--text-tokens", "16", "--json", str(target)]
    assert cli.main(argv) == 0
    assert cli.main([*argv, *changed]) == 0
    assert len(calls) == 2
    assert len(json.loads(target.read_text())["rows"]) == 2


def test_another_machine_measures_anew_but_another_day_does_not(measured, tmp_path, monkeypatch):
    calls, target = measured[0], tmp_path / "sweep.json"
    argv = [*BASE, "--what", "train", "--text-tokens", "16", "--json", str(target)]
    true = clock.environment
    assert cli.main(argv) == 0
    monkeypatch.setattr(clock, "environment", lambda *args: {**true(*args), "date": "2031-01-01"})
    assert cli.main(argv) == 0
    assert len(calls) == 1
    monkeypatch.setattr(clock, "environment", lambda *args: {**true(*args), "threads": 99})
    assert cli.main(argv) == 0
    assert len(calls) == 2


def test_overwrite_begins_anew(measured, tmp_path):
    calls, target = measured[0], tmp_path / "sweep.json"
    argv = [*BASE, "--what", "train", "--text-tokens", "16", "--json", str(target)]
    assert cli.main(argv) == 0
    assert cli.main([*argv, "--overwrite"]) == 0
    assert len(calls) == 2
    assert len(json.loads(target.read_text())["rows"]) == 1


def test_break_even_in_the_table(measured, capsys):
    """Half of the time minus 10 ms is saved: even at 20 text tokens, on straight lines between 16 (-12.5%) and 64
    (34.4%) at 28.8."""
    assert cli.main([*BASE, "--what", "train", "--text-tokens", "16,64", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "- tiny, training step (samples a batch 2, budget 8 + 12): skipping is faster from 29 text tokens on." in out
    assert "| tiny | 2 | 16 | 8 + 12 | training step | - | 16.00 | 18.00 | -12.5% | 50.0% | -25.0% |" in out


def test_curves_differ_in_one_thing_alone(measured):
    points = []
    for batch, text, retained in [(1, 16, 8), (1, 64, 8), (2, 16, 8), (2, 64, 8), (1, 16, 4)]:
        argv = [*BASE[2:], "--batch", str(batch), "--text-tokens", str(text), "--num-retained", str(retained)]
        (_, job), _ = sweep.grid(sweep._parser().parse_args(argv))
        row = {"what": "train", "settings": job.settings, "report": synthetic("train", job)}
        points += sweep_page.points_of(row)
    found = sweep_page.break_evens(points)
    assert [(one["axis"], one["others"], one["when"]) for one in found] == [
        ("text_tokens", {"batch": 1, "budget": "8 + 12"}, "from"),
        ("text_tokens", {"batch": 2, "budget": "8 + 12"}, "from"),
        ("batch", {"text_tokens": 16, "budget": "8 + 12"}, "never"),
        ("batch", {"text_tokens": 64, "budget": "8 + 12"}, "always"),
        ("visual", {"batch": 1, "text_tokens": 16}, "never"),
    ]


def test_the_picture(measured, tmp_path):
    target = tmp_path / "sweep.png"
    assert cli.main([*BASE, *GRID, "--png", str(target)]) == 0
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        assert picture.width > 2.5 * picture.height  # a panel of points and one each of training and answers


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--what", "sing"], "--what: unknown 'sing'; known: train, infer"),
        (["--family", "llava,lava"], "--family: unknown family 'lava'; known: llava, llava_hd, cos"),
        (["--size", "huge"], "--size: unknown size 'huge'; known: tiny, cpu"),
        (["--batch", "1,x"], "--batch 1,x: expected whole numbers, such as 16 or 16,64,256"),
        (["--batch", "0,2"], "--batch 0,2: expected 1 or more"),
        (["--text-tokens", "2"], "--text-tokens 2: expected 4 or more"),
        (["--layers", "1,3"], "--layers 3: this size has 2 decoder layers"),
        (["--budgets", "8-12"], "--budgets 8-12: expected retained+skipped, such as 100+156"),
        (["--budgets", "8+12,60+9"], "num_retained 60 + num_skipped 9 is more than the 64 patches"),
        (["--budgets", "8+12", "--num-retained", "8"], "--budgets does not go with --num-retained and --num-skipped"),
        (["--new-tokens", "1"], "--new-tokens 1: at least 2 are needed"),
    ],
)
def test_mistakes_are_one_line_before_any_work(argv, message, measured, capsys):
    assert cli.main([*BASE, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert measured[0] == []


@pytest.mark.parametrize("text", ['{"kind": "recipe"}', "my notes"])
def test_a_file_that_is_no_sweeps_is_kept(text, measured, tmp_path, capsys):
    target = tmp_path / "other.json"
    target.write_text(text)
    assert cli.main([*BASE, "--json", str(target)]) == 2
    assert "exists and is no sweep's; give another name, or --overwrite" in capsys.readouterr().err
    assert target.read_text() == text


def test_a_report_that_cannot_be_written_is_said_before_any_work(measured, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path, said in ((tmp_path, "is a folder; name a file in it"), (tmp_path / "file/x.json", "is a file, not a")):
        assert cli.main([*BASE, "--json", str(path)]) == 2
        assert said in capsys.readouterr().err
    assert measured[0] == []


@pytest.mark.parametrize("flag", ["--markdown", "--png"])
def test_drawings_that_exist_are_kept(flag, measured, tmp_path, capsys):
    target = tmp_path / "old"
    target.write_text("mine")
    assert cli.main([*BASE, flag, str(target)]) == 2
    assert capsys.readouterr().err == f"error: {flag} {target}: exists; give another name, or --overwrite\n"
    assert measured[0] == []


def test_points_that_do_not_fit_are_left_out_and_said(measured, monkeypatch, capsys):
    monkeypatch.setattr(room, "available_bytes", lambda device: 5 * 1024)
    assert cli.main([*BASE, "--what", "train", "--text-tokens", "16", "--batch", "2,64"]) == 0
    assert measured[0] == [("train", "llava", 2, 16)]
    assert "left out: --size tiny, family llava, batch 64, 16 text tokens: bench train needs" in capsys.readouterr().err
    monkeypatch.setattr(room, "available_bytes", lambda device: 0)
    assert cli.main([*BASE, "--what", "train"]) == 2


def test_a_point_whose_memory_runs_out_does_not_end_the_sweep(measured, monkeypatch, capsys):
    inner = sweep.MEASURES["train"]

    def run(job):
        if job.size.batch == 1:
            raise flags.OutOfMemory("batch 1: out of memory")
        return inner(job)

    monkeypatch.setitem(sweep.MEASURES, "train", run)
    assert cli.main([*BASE, "--what", "train", "--text-tokens", "16", "--batch", "1,2"]) == 0
    captured = capsys.readouterr()
    assert "left out: batch 1: out of memory" in captured.err
    assert "1 measured" in captured.err
    assert cli.main([*BASE, "--what", "train", "--text-tokens", "16", "--batch", "1"]) == 2


def test_a_sweep_that_measures(tmp_path):
    """Nothing faked: a point of each kind, its reports as `bench train` and `bench infer` make them."""
    target = tmp_path / "sweep.json"
    argv = ["--text-tokens", "16", "--new-tokens", "2,3", "--json", str(target), "--png", str(tmp_path / "sweep.png")]
    assert cli.main([*BASE, *argv]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["what"] for row in rows] == ["train", "infer"]
    assert all(PEER in row["report"]["peers"] for row in rows)
    assert rows[1]["report"]["kv_check"]["equal"]
    assert [point["kind"] for row in rows for point in sweep_page.points_of(row)] == [
        "training step",
        "prefill",
        "decode",
        "answer",
        "answer",
    ]


@pytest.mark.parametrize("flag", ["--markdown", "--png"])
def test_a_sweep_that_goes_on_replaces_its_own_drawings_alone(flag, measured, tmp_path, capsys):
    target, mine = tmp_path / "sweep.json", tmp_path / "mine"
    argv = [*BASE, "--what", "train", "--text-tokens", "16", "--json", str(target)]
    drawn = [flag, str(tmp_path / "drawn")]
    assert cli.main([*argv, *drawn]) == 0
    mine.write_text("mine")
    capsys.readouterr()
    assert cli.main([*argv, flag, str(mine)]) == 2
    assert capsys.readouterr().err == f"error: {flag} {mine}: exists; give another name, or --overwrite\n"
    assert mine.read_text() == "mine"
    # its own is drawn again, unless somebody has changed it since
    assert cli.main([*argv, *drawn, "--batch", "1"]) == 0
    (tmp_path / "drawn").write_text("changed by hand")
    assert cli.main([*argv, *drawn]) == 2
    assert (tmp_path / "drawn").read_text() == "changed by hand"
    assert len(measured[0]) == 2


def test_a_place_that_cannot_be_written_is_said_before_any_work(measured, tmp_path, capsys):
    assert cli.main([*BASE, "--json", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --json {tmp_path}: is a folder; name a file in it\n"
    assert measured[0] == []


def test_what_is_named_twice_is_measured_and_shown_once(measured, capsys):
    argv = ["--what", "train", "--text-tokens", "16", "--family", "llava,llava", "--budgets", "8+12,8+12"]
    assert cli.main([*BASE, *argv]) == 0
    assert len(measured[0]) == 1
    assert capsys.readouterr().out.count("| tiny |") == 1


def test_the_picture_says_of_what_size_it_is(measured, tmp_path, monkeypatch):
    """And how many of its layers ran, where there is but one point and so no legend of curves."""
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    argv = ["--what", "train", "--text-tokens", "16", "--layers", "1", "--png", str(tmp_path / "sweep.png")]
    assert cli.main([*BASE, *argv, "--family", "llava,cos"]) == 0
    assert titles == ["tiny, 1 of 2 layers; tiny, cos, 1 of 2 layers"]
