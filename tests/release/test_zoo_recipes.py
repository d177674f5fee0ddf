"""The model zoo's recipes: every row of the paper's tables with its figures, and scripts that train what is said."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llava_sv.bench.memory_states import layout_of
from llava_sv.bench.paper_table import hd_baseline
from llava_sv.errors import UserError
from llava_sv.release.zoo_memory import zero_config
from llava_sv.release.zoo_recipes import ZOO, read_zoo
from llava_sv.train.throughput import PEAKS

ROOT = Path(__file__).resolve().parents[2]

EIGHT = ("MME", "TextVQA", "MMB", "MMVet", "MMMU", "MathV", "OCRB", "MMStar")
NINE = (*EIGHT, "Avg")
FIVE = ("GQA", "MMB", "TextVQA", "MMVet", "Avg %")

OURS = {
    # name: table, benchmarks, scores, (hours, FLOPs in percent, latency in ms), (retained, skipped), data
    "llava-sv-llama-3-8b-dense": (
        *(2, NINE, (1535, 58.6, 72.2, 32.8, 39.6, 21.3, 32.7, 36.5, 42.0), (10.2, 100, 125)),
        *(None, "llava-665k"),
    ),
    "llava-sv-llama-3-8b-skip-100-156": (
        *(2, NINE, (1519, 56.5, 72.5, 32.4, 38.8, 21.2, 30.7, 36.5, 41.3), (7.9, 25, 90)),
        *((100, 156), "llava-665k"),
    ),
    "llava-sv-llama-3-8b-skip-256-320": (
        *(2, NINE, (1530, 57.3, 72.7, 35.6, 39.2, 21.4, 32.0, 40.0, 42.6), (9.0, 60, 103)),
        *((256, 320), "llava-665k"),
    ),
    "llava-sv-hd-llama-3-8b-dense": (
        *(2, NINE, (1533, 64, 71.8, 35.3, 39.3, 20, 37.4, 40.5, 44.0), (19, 100, 450)),
        *(None, "llava-665k"),
    ),
    "llava-sv-hd-llama-3-8b-skip-576-576": (
        *(2, NINE, (1534, 61.2, 73.1, 35.9, 39.7, 21.2, 34.1, 39.3, 43.5), (12.2, 50, 250)),
        *((576, 576), "llava-665k"),
    ),
    "llava-sv-cos-llama-3-8b-dense": (
        *(2, NINE, (1585, 64.4, 77.1, 39.4, 39.2, 21.5, 39.2, 41.2, 46.0), (15.3, 100, 160)),
        *(None, "llava-665k"),
    ),
    "llava-sv-cos-llama-3-8b-skip-272-256": (
        *(2, NINE, (1563, 63.7, 76.5, 41.7, 40.3, 21.2, 37, 41.9, 46.0), (9.8, 25, 90)),
        *((272, 256), "llava-665k"),
    ),
    "llava-sv-cos-llama-3-8b-skip-272-256-sv-1m": (
        *(2, NINE, (1569, 67.1, 77.1, 43.3, 40.7, 22.0, 50.7, 44.4, 49.3), (16.3, 25, 90)),
        *((272, 256), "sv-1m"),
    ),
    "llava-sv-cos-llama-3-8b-skip-272-256-sv-9m": (
        *(3, EIGHT, (1550, 69.1, 78.4, 51.7, 43, 61.3, 69.4, 52.3), (72, None, None)),
        *((272, 256), "sv-9m"),
    ),
    "llava-sv-vicuna-7b-dense": (5, FIVE, (61.9, 64.7, 58.2, 31.1, 100), (None, None, None), None, "llava-665k"),
    "llava-sv-vicuna-7b-skip-64-156": (
        5,
        FIVE,
        (60.8, 65.1, 57.4, 32.5, 100),
        (None, None, None),
        (64, 156),
        "llava-665k",
    ),
}

OTHERS = {
    (2, "LLaVA-FastV"): (1453, 56.1, 71, 32.4, 37.3, 20.6, 28.8, 36.3, 40.4),
    (2, "MQT-LLaVA"): (1487, 53.6, 69, 28.2, 37.8, 16.8, 28.1, 36.5, 38.6),
    (2, "LLaVA-Tokenpacker"): (1538, 56.2, 72.3, 32.1, 39.0, 19.3, 29.8, 35.0, 40.5),
    (3, "mPLUG-Owl3 (Qwen2)"): (69.0, 77.6, 40.1, 65.0, 40.1),
    (3, "Cambrian (LLaMA-3)"): (1547, 71.7, 75.9, 42.7, 49.0, 62.4),
    (3, "LLaVA (LLaMA-3)"): (1535, 58.6, 72.2, 32.8, 39.6, 21.3, 32.7, 36.5),
    (3, "Mini-Gemini-HD (LLaMA-3)"): (1606, 70.2, 72.7, 37.3, 37.0, 47.7),
    (3, "LLaVA-Next (LLaMA-3)"): (1604, 64.6, 72.1, 41.7, 36.3, 49.0),
    (3, "Ovis (LLaMA-3)"): (77.4, 44.7, 40.8, 49.5),
    (3, "MiniCPM-V2.5 (LLaMA-3)"): (76.6, 77.6, 45.8, 54.3, 72.5),
    (5, "SparseVLM (64 tokens)"): (52.7, 56.2, 51.8, 23.3, 85.2),
    (5, "VisionZip (64 tokens)"): (55.1, 60.1, 55.5, 31.7, 93.7),
    (5, "PDrop (64 tokens)"): (47.5, 58.8, 50.6),
    (5, "FasterVLM (58 tokens)"): (54.9, 60.6, 55.3, 30.1, 93.1),
    (5, "LLaVA-PruMerge (32 tokens)"): (60.9, 56.0),
}


def test_every_row_of_the_tables_is_there_with_the_papers_figures():
    zoo = read_zoo()
    assert list(zoo.checkpoints) == list(OURS)
    for name, (table, benchmarks, scores, figures, budget, data) in OURS.items():
        one = zoo.checkpoints[name]
        assert one.table == table
        assert one.paper.scores == dict(zip(benchmarks, scores)), name
        assert (one.paper.hours, one.paper.flops, one.paper.latency) == figures, name
        assert one.paper.gpus == (16 if name.endswith("sv-9m") else 8)
        found = one.sft.budget()
        assert (found and (found.retained, found.skipped)) == budget, name
        assert one.sft.data == data
        assert (one.dense is None) is (budget is None)
    assert {(one.table, one.label): tuple(one.paper.scores.values()) for one in zoo.others} == OTHERS


def dry_run(command: str) -> dict[str, str]:
    """Flag -> value of what the line would start."""
    clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
    done = subprocess.run(
        ["bash", "-c", f"DRY_RUN=1 {command}"], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    words = words[words.index("llava_sv/train/train_mem.py") + 1 :]
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


STAGES = {**read_zoo().pretraining, **{name: one.sft for name, one in read_zoo().checkpoints.items()}}


@pytest.mark.parametrize("name", STAGES)
def test_the_command_trains_what_the_recipe_says(name):
    zoo = read_zoo()
    flags = dry_run(STAGES[name].command)
    expected = STAGES[name].flags(zoo)
    numbers = ("learning_rate", "num_train_epochs")
    assert {key: float(flags[key]) for key in numbers} == {key: float(expected[key]) for key in numbers}
    assert {key: flags.get(key) for key in expected if key not in numbers} == {
        key: value for key, value in expected.items() if key not in numbers
    }
    for key in (key for key in flags if key.startswith("sv_") or key in ("tune_mm_mlp_adapter", "hd_max_tiles")):
        assert key in expected, f"the script says --{key}, the recipe does not"
    assert flags["output_dir"] == f"checkpoints/{name}"
    per_step = int(flags["per_device_train_batch_size"]) * int(flags["gradient_accumulation_steps"]) * 8
    assert per_step == STAGES[name].batch
    if name in zoo.checkpoints:
        before = zoo.checkpoints[name].pretrain
        assert flags["pretrain_mm_mlp_adapter"] == f"checkpoints/{before}/mm_projector.bin"
        stage = zoo.pretraining[before]
        assert (stage.decoder, stage.encoder) == (STAGES[name].decoder, STAGES[name].encoder)


def test_a_command_that_differs_from_its_recipe_is_seen():
    stage = STAGES["llava-sv-llama-3-8b-skip-100-156"]
    changed = dry_run(f"NUM_SKIPPED=200 {stage.command}")
    assert changed["sv_num_skipped"] == "200"
    assert stage.flags(read_zoo())["sv_num_skipped"] == "156"


def test_the_papers_setup():
    for name, one in read_zoo().checkpoints.items():
        vicuna = "vicuna" in name
        assert (one.sft.lr, one.sft.batch, one.sft.epochs) == (2e-5 if vicuna else 1e-5, 128, 1)
        pretrain = read_zoo().pretraining[one.pretrain]
        assert (pretrain.lr, pretrain.batch, pretrain.epochs, pretrain.retained) == (1e-3, 256, 1, None)
        assert pretrain.data == ("cos-pretrain" if one.sft.family == "cos" else "llava-558k")


def test_what_the_recipes_repeat_is_what_it_was_taken_from():
    zoo = read_zoo()
    assert zoo.assumptions.hd_dense_tokens == hd_baseline()
    assert {one.title: one.tflops for one in zoo.devices.values()} == {
        "A100 80 GB": PEAKS["A100"],
        "H200": PEAKS["H200"],
    }
    assert {name: one.records for name, one in zoo.data.items()} == {
        **{"llava-558k": 558128, "llava-665k": 665298, "cos-pretrain": 65_000_000, "sv-1m": 1004627, "sv-9m": 8939353}
    }
    measured = (ROOT / "docs/Benchmarks.md").read_text(encoding="utf-8")
    heads = {"llava": "| cpu | 2 |", "llava_hd": "| cpu, llava_hd | 1 |", "cos": "| cpu, cos | 2 |"}
    for family, share in zoo.assumptions.time_share.items():
        lines = [line for line in measured.splitlines() if line.startswith(heads[family]) and "| model |" in line]
        assert f"| {share:.1%} |" in lines[0], family


@pytest.mark.parametrize("stage", [2, 3])
def test_memory_is_planned_with_the_scripts_deepspeed_configuration(stage):
    config = json.loads((ROOT / f"scripts/zero{stage}.json").read_text())
    for world, hidden in ((8, 4096), (2, 5120)):
        assert layout_of(zero_config(stage), world, hidden) == layout_of(config, world, hidden)


def changed(tmp_path: Path, change) -> Path:
    given = yaml.safe_load(ZOO.read_text(encoding="utf-8"))
    change(given)
    path = tmp_path / "zoo.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda zoo: zoo["checkpoints"][0]["sft"].update(data="llava-1b"),
            "field 'data' is 'llava-1b'; known: cos-pretrain, llava-558k",
        ),
        (lambda zoo: zoo["checkpoints"][0]["sft"].update(colour=1), "sft: unknown field 'colour'; known: "),
        (lambda zoo: zoo["checkpoints"][0]["sft"].pop("script"), "sft: field 'script' is missing"),
        (lambda zoo: zoo["checkpoints"][1].update(dense="nobody"), "field 'dense' is 'nobody'; known, of those above"),
        (lambda zoo: zoo["checkpoints"][1].update(pretrain="nobody"), "field 'pretrain' is 'nobody'; known: llava-sv-"),
        (lambda zoo: zoo["checkpoints"].append(zoo["checkpoints"][0]), "llava-sv-llama-3-8b-dense: there twice"),
        (lambda zoo: zoo["checkpoints"][0].pop("name"), "checkpoints[0]: field 'name' is missing"),
        (lambda zoo: zoo["checkpoints"][0].update(paper=7), "paper: expected fields, found 7"),
        (
            lambda zoo: zoo["pretraining"]["llava-sv-vicuna-7b-pretrain"].update(decoder="gpt"),
            "field 'decoder' is 'gpt'",
        ),
        (lambda zoo: zoo.pop("devices"), "expected a model zoo's fields"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_one_line(tmp_path, change, said):
    with pytest.raises(UserError) as caught:
        read_zoo(changed(tmp_path, change))
    assert said in str(caught.value)
    assert "zoo.yaml" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_commands_are_words_of_a_shell():
    stage = replace(STAGES["llava-sv-vicuna-7b-skip-64-156"], environment={"A": 1, "B": "x/y"})
    assert shlex.split(stage.command) == ["A=1", "B=x/y", "bash", "scripts/v1_5/finetune_skip.sh"]
