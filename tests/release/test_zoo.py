"""`llava-sv zoo` and docs/MODEL_ZOO.md: the page is what the command writes; flags, JSON, releases, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_sv import cli
from llava_sv.constants import GIB
from llava_sv.release import zoo_memory
from llava_sv.release.zoo import gather, main
from llava_sv.release.zoo_page import page, tokens_of
from llava_sv.release.zoo_recipes import read_zoo
from llava_sv.release.zoo_released import read_released
from llava_sv.train.memory_plan import Planner, read
from tests.release.test_zoo_recipes import dry_run

ROOT = Path(__file__).resolve().parents[2]
ZOO = read_zoo()
SKIP = "llava-sv-llama-3-8b-skip-100-156"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def error_of(capsys, *argv: str) -> str:
    assert cli.main(["zoo", *argv]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1, said
    return said


def test_the_page_is_what_the_command_writes():
    written = (ROOT / "docs/MODEL_ZOO.md").read_text(encoding="utf-8")
    assert written == page(gather(ZOO)), (
        "docs/MODEL_ZOO.md is not of today's recipes: llava-sv zoo --markdown docs/MODEL_ZOO.md --overwrite"
    )


def test_the_page_has_every_checkpoint_and_its_commands():
    text = (ROOT / "docs/MODEL_ZOO.md").read_text(encoding="utf-8")
    for name, one in ZOO.checkpoints.items():
        assert text.count(f"| `{name}` |") >= 4
        assert f"\n{one.sft.command}\n" in text
        assert f"\n{ZOO.pretraining[one.pretrain].command}\n" in text
    for other in ZOO.others:
        here = "`llava-sv-llama-3-8b-dense`" if other.label == "LLaVA (LLaMA-3)" else "not this project's"
        assert f"| {other.label} | {here} |" in text


def test_a_recipe_that_changes_changes_the_page():
    one = ZOO.checkpoints[SKIP]
    other = replace(one, paper=replace(one.paper, hours=7.0))
    text = page(gather(replace(ZOO, checkpoints={**ZOO.checkpoints, SKIP: other})))
    assert text != page(gather(ZOO))


def test_one_row(capsys):
    assert main(["--row", SKIP, "--device", "h200"]) == 0
    out = capsys.readouterr().out
    assert "bash scripts/v1_5/finetune_skip.sh" in out
    assert "8 x H200" in out
    assert "A100" not in out
    assert "llava-sv-cos" not in out


def test_json_and_assumptions_of_ones_own(tmp_path, capsys):
    path = tmp_path / "zoo.json"
    assert main(["--json", str(path), "--mfu", "0.4", "--text-tokens", "300"]) == 0
    found = json.loads(path.read_text())
    row = found["planned"][SKIP]
    assert set(found["planned"]) == set(ZOO.checkpoints)
    assert row["mfu"] == 0.4
    assert row["hours"]["a100-80gb"]["sft"] == pytest.approx(row["flops"]["sft"] / (8 * 312e12 * 0.4) / 3600)
    assert row["status"] == "planned"
    assert row["commands"] == ["bash scripts/v1_5/pretrain.sh", "bash scripts/v1_5/finetune_skip.sh"]
    assert row["paper"]["hours"] == 7.9
    assert found["checks"]["skipping"][0]["name"] == SKIP
    assert "Counted with an MFU of 0.4 and 300 text tokens" in capsys.readouterr().out
    plain = gather(ZOO, [SKIP]).costs[SKIP]
    assert plain["flops"]["sft"] < row["flops"]["sft"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--row", "llava-sv-llama-3-8b-skip"],
            "--row: no checkpoint 'llava-sv-llama-3-8b-skip' in the zoo; there are ",
        ),
        (["--row", "?"], "--row: no checkpoint '?' in the zoo; there are llava-sv-llama-3-8b-dense, "),
        (["--released", "nowhere"], "--released nowhere: no such folder; name the one that holds the releases"),
        (["--device", "tpu"], "--device: unknown device 'tpu'; known: a100-80gb, h200"),
        (["--mfu", "40"], "--mfu 40: expected a share of the peak, above 0 and at most 1, such as 0.4"),
        (["--mfu", "nan"], "--mfu nan: expected a share of the peak"),
        (["--text-tokens", "0"], "--text-tokens 0: expected a mean number of tokens"),
        (["--row", SKIP, "--markdown", "x.md"], "--row does not go with --markdown"),
        (
            ["--markdown", "docs/MODEL_ZOO.md"],
            "--markdown docs/MODEL_ZOO.md: exists; give another name, or --overwrite",
        ),
        (["--json", "docs", "--overwrite"], "--json docs: is a folder; name a file in it"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, said):
    assert said in error_of(capsys, *flags)


def test_tokens_of_a_picture():
    assert tokens_of(ZOO.checkpoints[SKIP].sft) == "100 + 156 of 576"
    assert tokens_of(ZOO.checkpoints["llava-sv-hd-llama-3-8b-dense"].sft) == "2880"


def test_every_stages_memory_is_kept():
    """The command answers at once, without tracing a model."""
    kept = [one["of"] for one in json.loads(zoo_memory.KEPT.read_text())]
    for stage in [*ZOO.pretraining.values(), *(one.sft for one in ZOO.checkpoints.values())]:
        assert zoo_memory.what_matters(ZOO, stage) in kept, "llava-sv zoo --plan-memory plans it"


def hold_against_the_plan(stage):
    """Versions of torch and transformers differ by less than a hundredth in what they keep."""
    planned, kept = zoo_memory.plan_memory(ZOO, stage), zoo_memory.memory_of(ZOO, stage)
    assert kept["gib"] == pytest.approx(planned["gib"], rel=0.01)
    assert (kept["layout"], kept["fewest"]) == (planned["layout"], planned["fewest"])


@pytest.mark.slow
def test_all_kept_memory_is_what_is_planned():
    for stage in [*ZOO.pretraining.values(), *(one.sft for one in ZOO.checkpoints.values())]:
        hold_against_the_plan(stage)


def test_the_plan_is_that_of_the_scripts_own_command(tmp_path):
    stage = ZOO.checkpoints["llava-sv-cos-llama-3-8b-skip-272-256"].sft
    llm, clip = zoo_memory.write_configs(ZOO, stage, tmp_path)
    flags = dry_run(f"LLM={llm} VISION_TOWER={clip} {stage.command}")
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    planner = Planner(read([*words, "--world_size", "8", "--gpu_memory", "80"]))
    takes = planner.estimate(planner.layout(), stage.per_device_batch, not planner.skips, True).device
    assert takes / GIB == pytest.approx(zoo_memory.memory_of(ZOO, stage)["gib"], rel=0.01)


def test_a_stage_that_is_not_kept_is_planned(monkeypatch):
    asked = []
    monkeypatch.setattr(zoo_memory, "plan_memory", lambda zoo, stage: asked.append(stage) or {"gib": 1.0})
    stage = replace(ZOO.checkpoints[SKIP].sft, per_device_batch=4)
    assert zoo_memory.memory_of(ZOO, stage) == {"gib": 1.0}
    assert zoo_memory.memory_of(ZOO, ZOO.checkpoints[SKIP].sft)["gib"] > 20
    assert asked == [stage]


def make_release(root: Path, name: str, accuracy: float = 0.75, **config: object) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    sizes = {"config.json": 100, "model.safetensors": 4_000_000}
    manifest = {"format": 1, "files": {file: {"bytes": size, "sha256": "0"} for file, size in sizes.items()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"mm_family": "cos", "dtype": "bfloat16", **config}))
    (root / "reports").mkdir(exist_ok=True)
    report = {"accuracy": accuracy, "per_category": {"fine_detail": 0.5}, "questions": 480}
    (root / "reports" / f"{name}.json").write_text(json.dumps(report))
    return folder


def test_releases_tell_of_themselves(tmp_path):
    make_release(tmp_path, "tiny-cos-skip", skip_vision={"num_retained": 80, "num_skipped": 64, "merge": True})
    make_release(tmp_path, "tiny-dense", accuracy=0.5, mm_family="llava")
    text = page(gather(ZOO, released=tmp_path))
    assert "| `tiny-cos-skip` | CoS | 80 retained, 64 skipped | bfloat16 | 4.0 | 75.0% | 50.0% | 480 |" in text
    assert "| `tiny-dense` | LLaVA | dense | bfloat16 | 4.0 | 50.0% | 50.0% | 480 |" in text
    assert "(8.0 MB)" in text
    assert [one.weights for one in read_released(tmp_path)] == [4_000_000, 4_000_000]


def test_a_planned_checkpoint_that_is_released_says_so(tmp_path):
    make_release(tmp_path, SKIP, mm_family="llava")
    lines = page(gather(ZOO, released=tmp_path)).splitlines()
    (line,) = [line for line in lines if line.startswith(f"| `{SKIP}` | 2 |")]
    assert line.endswith("| released |")
    assert sum(line.endswith("| planned |") for line in lines) == len(ZOO.checkpoints) - 1


def test_without_releases_the_page_says_how_to_make_them(tmp_path):
    assert "None yet: `bash scripts/zoo_tiny.sh`" in page(gather(ZOO, released=tmp_path / "none"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json; run bash scripts/zoo_tiny.sh"),
        (
            lambda folder: (folder / "manifest.json").write_text("{}"),
            "manifest.json: no list of files with their bytes",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json, line 1, column 2: not JSON"),
    ],
)
def test_a_damaged_release_is_one_line(tmp_path, capsys, damage, said):
    damage(make_release(tmp_path, "tiny"))
    assert said in error_of(capsys, "--released", str(tmp_path))
