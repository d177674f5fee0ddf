"""The tiny releases of playground/zoo: whole, answering as they did when they were evaluated, and told of truly; and
the script that makes them."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from llava_sv import cli

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "playground/zoo"
NAMES = ("tiny-llava-dense", "tiny-llava-skip", "tiny-llava-hd-skip", "tiny-cos-skip")


def release(name: str) -> Path:
    return ZOO / name


def report(name: str) -> dict:
    return json.loads((ZOO / "reports" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_whole(name, capsys):
    assert cli.main(["verify", str(release(name))]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_chat_answers_as_its_evaluation_did(name, capsys):
    folder = release(name)
    answers = ZOO / "reports" / f"{name}.answers.jsonl"
    first = json.loads(answers.read_text(encoding="utf-8").splitlines()[0])
    (picture,) = ZOO.glob("example.*")
    argv = ["chat", "--model-path", str(folder), "--image-file", str(picture), "--device", "cpu"]
    assert cli.main([*argv, "--prompt", first["prompt"]]) == 0
    assert capsys.readouterr().out.strip() == first["text"]
    assert first["correct"], "the example is one that the model knows"


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_the_evaluation_found(name):
    card = (release(name) / "README.md").read_text(encoding="utf-8")
    found = report(name)
    accuracy = found["accuracy"]
    (stated,) = re.findall(r"type: accuracy\s+value: ([\d.]+)\s+name: accuracy\n", card)
    assert float(stated) == pytest.approx(accuracy, abs=1e-6)
    assert re.search(rf"\| \**all\** \| \**{found['questions']}\** \| \**{accuracy:.1%}\** ", card)
    assert found["model_path"] == f"playground/zoo/{name}"
    right = [json.loads(line)["correct"] for line in (ZOO / "reports" / f"{name}.answers.jsonl").open(encoding="utf-8")]
    assert sum(right) / len(right) == pytest.approx(accuracy)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_place_of_the_machine_that_made_it(name):
    for path in [*release(name).iterdir(), ZOO / "reports" / f"{name}.json"]:
        if path.suffix in (".md", ".json", ".jinja", ".yaml"):
            assert not re.search(r"/(tmp|root|home|Users)/", path.read_text(encoding="utf-8")), path.name


STANDS_IN = r"""#!/bin/sh
# the interpreter, as far as the script is concerned: notes what it is asked for and makes the files it should
echo "$@" >>"$NOTES"
shift 2
command=$1 out="" json=""
while [ $# -gt 0 ]; do
    case "$1" in --out) out=$2 ;; --json) json=$2 ;; esac
    shift
done
case "$command" in
    release) mkdir -p "$out" && echo "{}" >"$out/config.json" ;;
    eval) echo "{}" >"$json" ;;
    zoo|verify) ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """(run, notes): the script on checkpoints that are none, with another interpreter."""
    families, bench = tmp_path / "families", tmp_path / "bench"
    for name in ("llava-dense", "llava-skip", "hd-skip", "cos-skip"):
        (families / name).mkdir(parents=True)
        (families / name / "config.json").write_text("{}")
        os.utime(families / name / "config.json", (1, 1))
    (families / "v1_5-pretrain").mkdir()
    (bench / "images").mkdir(parents=True)
    (bench / "bench.jsonl").write_text(
        '{"id": "bench-0", "image": "first.jpg", "question": "?"}\n{"image": "second.jpg"}\n'
    )
    (bench / "images/first.jpg").write_bytes(b"picture")
    python = tmp_path / "python"
    python.write_text(STANDS_IN)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    places = {
        "FAMILIES": families,
        "BENCH": bench,
        "ZOO": tmp_path / "zoo",
        "WORK": tmp_path / "work",
        "PYTHON": python,
    }
    notes = tmp_path / "notes"

    def run(*arguments: str, **more: str):
        notes.write_text("")
        clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
        clean |= {name: str(place) for name, place in places.items()} | {"NOTES": str(notes), "PAGE": "", **more}
        command = ["bash", "scripts/zoo_tiny.sh", *arguments]
        return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)

    return run, notes


def commands(notes: Path) -> list[str]:
    return [line.split()[2] for line in notes.read_text().splitlines()]


def test_the_script_runs_the_whole_pipeline_and_goes_on_where_it_stopped(script, tmp_path):
    run, notes = script
    done = run()
    assert done.returncode == 0, done.stderr
    assert commands(notes) == ["release", "eval", "release", "verify"] * 4
    lines = notes.read_text().splitlines()
    assert all("--dtype bfloat16" in line and "--force" in line for line in lines if " release " in line)
    tested = [index for index, line in enumerate(lines) if " release " in line and "--no-smoke-test" not in line]
    assert tested == [2, 6, 10, 14], "what stays is loaded and compared"
    assert "--pretrain-run" in lines[0], "where the pretraining is, the card reads it"
    assert "--eval" in lines[2]
    assert "--eval-dense" in lines[6], "the plain skipping model stands beside its dense control"
    assert {path.name for path in (tmp_path / "zoo").iterdir()} == {*NAMES, "reports", "example.jpg"}
    assert (tmp_path / "zoo/example.jpg").read_bytes() == b"picture"
    assert run().returncode == 0
    assert commands(notes) == ["verify"] * 4, "nothing is done twice"
    (tmp_path / "families/cos-skip/config.json").write_text("{ }")
    os.utime(tmp_path / "families/cos-skip/config.json", (4e9, 4e9))
    assert run().returncode == 0
    assert commands(notes) == ["verify"] * 3 + ["release", "eval", "release", "verify"], "a newer checkpoint is"
    assert run("--fresh").returncode == 0
    assert commands(notes).count("eval") == 4


def test_checkpoints_that_are_not_there_are_named(script, tmp_path):
    run, notes = script
    (tmp_path / "families/hd-skip/config.json").unlink()
    done = run()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"no checkpoint in {tmp_path}/families/hd-skip; train them by: bash scripts/families.sh" in line
    assert notes.read_text() == ""


def test_a_seed_that_is_no_number_and_an_unknown_option(script):
    run, _ = script
    assert "SEED must be a whole number, got 'one'" in run(SEED="one").stderr
    done = run("--again")
    assert (done.returncode, "unknown option '--again'" in done.stderr) == (2, True)
