"""A DeepSpeed configuration that contradicts the command line is one line that names both values, and exit code 2."""

import json
from types import SimpleNamespace

import pytest

from llava_sv.errors import UserError
from llava_sv.train.deepspeed_config import check_against_flags, check_config, fill_in
from llava_sv.train.distributed import prepare_deepspeed
from llava_sv.train.train import main

FLAGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "bf16": False,
    "fp16": False,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch",
}


def flags(**changed):
    return SimpleNamespace(**{**FLAGS, **changed})


CONTRADICTIONS = [
    (
        {"train_micro_batch_size_per_gpu": 4},
        '"train_micro_batch_size_per_gpu" is 4 in the configuration, but --per_device_train_batch_size is 2; make them',
    ),
    ({"gradient_accumulation_steps": 8}, "is 8 in the configuration, but --gradient_accumulation_steps is 1; make"),
    (
        {"train_batch_size": 64},
        '"train_batch_size" is 64 in the configuration, but --per_device_train_batch_size 2 x '
        "--gradient_accumulation_steps 1 x 4 process(es) is 8; make them the same",
    ),
    (
        {"train_batch_size": 3},
        '"train_batch_size" is 3 in the configuration: divided by 4 process(es) x 1 accumulated it leaves a batch of 0 '
        "a device, but",
    ),
    ({"gradient_clipping": 0.5}, '"gradient_clipping" is 0.5 in the configuration, but --max_grad_norm is 1.0; make'),
    ({"bf16": {"enabled": True}}, '"bf16.enabled" is true in the configuration, but --bf16 is false; make'),
    ({"fp16": {"enabled": True}}, '"fp16.enabled" is true in the configuration, but --fp16 is false; make'),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": "2e-5"}}},
        '"optimizer.params.lr" is 2e-5 in the configuration, but --learning_rate is 0.001; make',
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
        "is [0.9, 0.95] in the configuration, but --adam_beta1, --adam_beta2 is [0.9, 0.999]; make",
    ),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 1e-4}}},
        '"scheduler.params.warmup_max_lr" is 0.0001 in the configuration, but --learning_rate is 0.001; make',
    ),
    (
        {"scheduler": {"type": "WarmupDecayLR"}},
        '"scheduler" is WarmupDecayLR (--lr_scheduler_type linear) in the configuration, but --lr_scheduler_type is '
        "cosine; make them the same, or remove the section",
    ),
]


@pytest.mark.parametrize(("config", "said"), CONTRADICTIONS)
def test_both_values_are_named(config, said):
    with pytest.raises(UserError) as caught:
        check_against_flags(config, flags(), world=4)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_optimizer_section_and_an_optim_flag():
    with pytest.raises(UserError, match=r'"optimizer" is AdamW in the configuration, but --optim is adafactor; drop'):
        check_against_flags({"optimizer": {"type": "AdamW"}}, flags(optim="adafactor"), world=1)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_clipping": "auto"},
        {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "train_batch_size": 8},
        {"gradient_clipping": 1, "bf16": {"enabled": False}, "fp16": {"enabled": "auto"}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "1e-3", "betas": "auto"}}},
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 1e-3}}},
    ],
)
def test_what_agrees_passes(config):
    check_against_flags(config, flags(), world=4)


@pytest.mark.parametrize("stage", [4, -1, "3", "auto", True, None])
def test_an_unknown_stage(stage):
    with pytest.raises(
        UserError, match=r'"zero_optimization" has stage .*; known: 0, 1, 2, 3 \(see scripts/zero1.json'
    ):
        check_config({"zero_optimization": {"stage": stage}})


def test_a_configuration_that_is_no_object():
    with pytest.raises(UserError, match="expected a JSON object, got a list"):
        check_config([1])


def test_what_is_left_out_is_the_flags():
    """DeepSpeed itself would train in float32 without clipping."""
    config = fill_in({"zero_optimization": {"stage": 2}, "bf16": {"immediate_grad_update": True}}, flags(bf16=True))
    assert config["gradient_clipping"] == config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["bf16"] == {"immediate_grad_update": True, "enabled": "auto"}
    assert "fp16" not in config
    assert fill_in({"gradient_clipping": 1.0}, flags())["gradient_clipping"] == 1.0


def test_clipping_reaches_deepspeed(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = flags(deepspeed={"zero_optimization": {"stage": 2}}, use_cpu=False, own_rates=list)
    assert prepare_deepspeed(args)["gradient_clipping"] == "auto"
    args.deepspeed = {"train_batch_size": 4}
    with pytest.raises(UserError, match="x 4 process"):
        prepare_deepspeed(args)


@pytest.mark.parametrize(("config", "said"), [*CONTRADICTIONS[:1], ({"zero_optimization": {"stage": 7}}, "stage 7")])
def test_a_contradiction_ends_in_one_line(world, tmp_path, capsys, config, said):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(config))
    assert main(world.flags("sft", tmp_path / "out", "--deepspeed", str(file))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize("flag", ["--per_device_train_batch_size", "--gradient_accumulation_steps"])
def test_a_batch_of_none_is_refused(world, tmp_path, capsys, flag):
    assert main(world.flags("sft", tmp_path, flag, "0")) == 2
    assert f"error: {flag}: expected 1 or more, got 0" in capsys.readouterr().err
