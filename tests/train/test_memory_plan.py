"""`llava-sv doctor --plan`: what it says, what it refuses; and the batch that is found."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.train import find_batch, train
from tests.train.runs import losses


def plan_flags(world, *extra):
    return ["doctor", "--plan", *world.flags("skip", world.folder / "out"), "--gpu_memory", "80", *extra]


def refused(capsys, argv):
    assert cli.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("error:")]) == 1
    return said[-1]


def test_the_page_and_its_json(world, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert cli.main(plan_flags(world, "--world_size", "2", "--text_tokens", "40", "--json", str(out))) == 0
    page, plan = capsys.readouterr().out, json.loads(out.read_text())
    assert plan["model"]["sequence"] == {"dense": 40 + 16, "skipping": 40 + 4 + 5 + 2}
    assert [row["layout"] for row in plan["rows"] if row["own"]] == ["DDP"]
    assert {"ZeRO-1", "ZeRO-2", "ZeRO-3"} <= {row["layout"] for row in plan["rows"]}
    own = next(row for row in plan["rows"] if row["own"])
    trained = sum(counts[1] for counts in plan["model"]["parameters"].values())
    assert own["skipping"]["parts"]["optimizer"] == 8 * trained
    assert plan["run"]["batch"] == 2
    assert "this command fits" in page
    assert "assumed" in page


def test_lora_is_planned_as_it_is_trained(world, tmp_path):
    """Adapters of rank 2 on q_proj of two layers of width 32; under bf16 all that is frozen is narrow."""
    plans = {}
    lora = ("--lora_enable", "True", "--lora_r", "2", "--lora_target_modules", "q_proj")
    for name, flags in (("full", ()), ("lora", lora), ("narrow", (*lora, "--bf16", "True"))):
        out = tmp_path / f"{name}.json"
        assert cli.main(plan_flags(world, "--text_tokens", "20", *flags, "--json", str(out))) == 0
        plans[name] = json.loads(out.read_text())
    counts = {name: plan["model"]["parameters"] for name, plan in plans.items()}
    assert counts["lora"]["language model adapters"] == [2 * 2 * (32 + 32)] * 2
    assert counts["lora"]["language model"] == [counts["full"]["language model"][0], 0]
    assert counts["lora"]["projector"] == counts["full"]["projector"]
    frozen = sum(total - trains for total, trains in counts["lora"].values())
    weights = {
        name: row["skipping"]["parts"]["weights"] for name, plan in plans.items() for row in plan["rows"] if row["own"]
    }
    assert weights["lora"] - weights["narrow"] == 2 * frozen


def test_a_script_says_its_plan():
    command = ["bash", "-c", "PLAN=1 PRESET=tiny MAX_LENGTH=128 PER_DEVICE_BATCH=2 bash scripts/v1_5/finetune_skip.sh"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "<- this command" in done.stdout


def test_bad_input(world, capsys):
    assert "unknown family 'qwen'" in refused(capsys, plan_flags(world, "--mm_family", "qwen"))
    absent = refused(capsys, plan_flags(world, "--model_name_or_path", "nobody/nothing"))
    assert "no config.json here to plan from" in absent
    assert "hf download nobody/nothing config.json" in absent
    assert "unknown flag --modle" in refused(capsys, plan_flags(world, "--modle", "x"))
    assert "leaves no room for text" in refused(capsys, plan_flags(world, "--model_max_length", "8"))
    assert "--gpu_memory -1.0" in refused(capsys, plan_flags(world, "--gpu_memory", "-1"))
    bits = refused(capsys, plan_flags(world, "--lora_enable", "True", "--bits", "4"))
    assert "--bits 4 cannot be planned: plan with --bits 16" in bits
    small = refused(capsys, plan_flags(world, "--text_tokens", "20", "--gpu_memory", "0.5"))
    assert "a batch of 1 does not fit" in small
    assert "--lora_enable True" in small


def test_largest_is_looked_for_both_ways():
    asked = []

    def fits(batch):
        asked.append(batch)
        return batch <= 8

    assert find_batch.largest(fits, [1, 2, 4, 8, 16, 32], 2) == 8
    assert asked == [2, 4, 8, 16]
    assert find_batch.largest(fits, [1, 2, 4, 8, 16, 32], 32) == 8
    assert find_batch.largest(lambda batch: False, [1, 2], 2) == 0


def test_global_batch_sets_the_accumulation(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--per_device_train_batch_size", "4", "--global_batch_size", "32"]
    assert find_batch.settle(flags)[-2:] == ["--gradient_accumulation_steps", "4"]
    assert find_batch.settle(["--learning_rate", "1"]) == ["--learning_rate", "1"]
    for flags, said in (
        (["--per_device_train_batch_size", "3", "--global_batch_size", "32"], "no multiple of"),
        (["--per_device_train_batch_size", "auto", "--global_batch_size", "33"], "no multiple of the 2 processes"),
        (["--per_device_train_batch_size", "auto"], "needs --global_batch_size"),
        (["--global_batch_size", "many"], "expected a whole number"),
        (["--auto_find_batch_size", "True"], "would change the global batch"),
    ):
        with pytest.raises(UserError, match=said):
            find_batch.settle(flags)


def test_found_batch_trains_as_the_same_batch_by_hand(world, tmp_path, monkeypatch):
    real = find_batch.run_step

    def limited(model, batch, args):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no more than 2")
        real(model, batch, args)

    monkeypatch.setattr(find_batch, "run_step", limited)
    monkeypatch.setattr(find_batch, "probes", lambda args: True)
    monkeypatch.setattr(find_batch, "_planned", lambda argv, world: 4)
    auto = ["--per_device_train_batch_size", "auto", "--global_batch_size", "8"]
    hand = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    for name, flags in (("auto", auto), ("hand", hand)):
        assert train.main(world.flags("skip", tmp_path / name, "--max_steps", "2", *flags)) == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "hand")
    summary = json.loads((tmp_path / "auto" / "train_summary.json").read_text())
    assert summary["settings"]["batch"] == 8


def test_without_a_gpu_the_plan_decides(world, monkeypatch):
    monkeypatch.setattr(find_batch, "free_gib", lambda use_cpu: 4.0)
    auto = ["--per_device_train_batch_size", "auto", "--global_batch_size", "4"]
    argv = find_batch.settle(world.flags("skip", world.folder / "out", "--model_max_length", "64", *auto))
    assert argv[-6:-2] == ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    monkeypatch.setattr(find_batch, "free_gib", lambda use_cpu: 0.5)
    with pytest.raises(UserError, match="a batch of 1 does not fit"):
        find_batch.settle(world.flags("skip", world.folder / "out", "--model_max_length", "64", *auto))
