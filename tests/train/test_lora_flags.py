"""LoRA's flags: what each mistake says, in one line, before anything is loaded; and what resuming compares."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train import checkpoint, flags, lora, resume
from llava_sv.train.train import main
from tests.train.lora_runs import LORA, run

BASE = ["--output_dir", "x", "--use_cpu", "True", "--report_to", "none"]


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """OUTPUT of a short LoRA run."""
    output = tmp_path_factory.mktemp("adapter")
    run(world.flags("skip", output, *LORA, "--save_strategy", "steps", "--save_steps", "2"))
    return output


def test_llavas_own_flags_and_their_defaults():
    words = "--lora_enable True --lora_r 128 --lora_alpha 256 --lora_dropout 0.1 --lora_bias all --bits 16"
    model = flags.parse([*BASE, *words.split()])[0]
    assert model.lora_settings() == {
        **{"r": 128, "alpha": 256, "dropout": 0.1, "bias": "all", "target_modules": [], "weight_path": None}
    }
    model = flags.parse([*BASE, "--lora_enable", "--bits", "4", "--double_quant", "False", "--quant_type", "fp4"])[0]
    assert model.lora_settings() == {
        **{"r": 64, "alpha": 16, "dropout": 0.05, "bias": "none", "target_modules": [], "weight_path": None},
        **{"bits": 4, "double_quant": False, "quant_type": "fp4"},
    }
    assert flags.parse([*BASE, "--lora_enable", "False", "--bits", "16"])[0].lora_settings() is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora_enable True --lora_r 0", "--lora_r: expected a rank of 1 or more, got 0"),
        ("--lora_enable True --lora_alpha 0", "--lora_alpha: expected 1 or more, got 0"),
        ("--lora_enable True --lora_dropout 1", "--lora_dropout: expected a share from 0 to below 1, got 1.0"),
        ("--lora_enable True --lora_bias some", "--lora_bias: unknown 'some'; known: none, all, lora_only"),
        ("--lora_enable True --bits 4 --quant_type int4", "--quant_type: unknown 'int4'; known: nf4, fp4"),
        ("--lora_enable True --quant_type nf4", "--quant_type is for --bits 4: add it, or drop the flag"),
        ("--lora_enable True --bits 8 --double_quant True", "--double_quant is for --bits 4: add it, or drop the flag"),
        ("--lora_enable True --bits 3", "--bits: expected 16, 8 or 4, got 3"),
        ("--bits 4", "--bits 4: quantised weights cannot train by themselves; add --lora_enable True"),
        ("--lora_r 8", "--lora_r without --lora_enable True: add it, or drop the flag"),
        ("--lora_enable False --lora_dropout 0.1", "--lora_dropout without --lora_enable True"),
        ("--lora_weight_path x", "--lora_weight_path without --lora_enable True"),
        ("--lora_target_modules q_proj", "--lora_target_modules without --lora_enable True"),
        ("--lora_enable True --lora_target_modules ,", "--lora_target_modules: names no layer"),
        ("--lora_enable True --tune_mm_mlp_adapter True", "--tune_mm_mlp_adapter trains the projector alone"),
        ("--lora_enable True --lora_weight_path a --pretrain_mm_mlp_adapter b", "brings its projector along"),
    ],
)
def test_a_mistake_is_one_line(words, said):
    with pytest.raises(UserError) as caught:
        flags.parse([*BASE, *words.split()])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def refused(capsys, argv):
    """The line that training ends with, at exit code 2 and before a model is built."""
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def nothing_is_built(monkeypatch):
    monkeypatch.setattr("llava_sv.train.build.build", lambda *args: pytest.fail("a model was built"))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_qlora_says_what_it_needs_before_anything_is_loaded(world, tmp_path, capsys, monkeypatch, bits):
    nothing_is_built(monkeypatch)
    line = refused(capsys, world.flags("skip", tmp_path, *LORA, "--bits", bits))
    assert line == (
        f"error: --bits {bits}: needs a CUDA device and bitsandbytes (bash scripts/setup.sh --extra train-gpu); "
        "use --bits 16 here"
    )


def test_qlora_without_bitsandbytes_on_a_cuda_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("llava_sv.model.quantization.is_bitsandbytes_available", lambda: False)
    model = flags.parse([*BASE, "--lora_enable", "True", "--bits", "8"])[0]
    args = SimpleNamespace(fsdp=None, deepspeed=None, use_cpu=False)
    with pytest.raises(UserError, match=r"--bits 8: quantised weights need bitsandbytes .*setup.sh --extra train-gpu"):
        lora.check(model, args)
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match="--bits 8 with ZeRO-3: quantised weights cannot be partitioned; use --deepsp"):
        lora.check(model, args)
    args.fsdp = "full_shard"
    with pytest.raises(UserError, match="--lora_enable with --fsdp is not supported"):
        lora.check(model, args)


def test_an_adapter_folder_is_no_base(world, adapter, tmp_path, capsys, monkeypatch):
    nothing_is_built(monkeypatch)
    argv = world.flags("skip", tmp_path)
    argv[argv.index("--model_name_or_path") + 1] = str(adapter)
    assert f"--model_name_or_path {adapter}: is a folder of adapters" in refused(capsys, argv)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--lora_weight_path", "no/such"], "--lora_weight_path no/such: no adapter_config.json there"),
        (["--lora_weight_path", "{}", "--lora_r", "8"], "was trained with --lora_r 4, now 8: set it as it was"),
        (["--lora_weight_path", "{}", "--lora_alpha", "3"], "was trained with --lora_alpha 8, now 3"),
        (["--lora_weight_path", "{}", "--lora_bias", "all"], "was trained with --lora_bias none, now all"),
    ],
)
def test_adapters_to_start_from_that_do_not_fit(world, adapter, tmp_path, capsys, monkeypatch, extra, said):
    nothing_is_built(monkeypatch)
    extra = [word.format(adapter) for word in extra]
    assert said in refused(capsys, world.flags("skip", tmp_path, *LORA, *extra))


def test_adapters_of_other_layers_are_not_started_from(world, adapter, tmp_path, capsys):
    argv = world.flags("skip", tmp_path, *LORA, "--lora_weight_path", str(adapter), "--lora_target_modules", "q_proj")
    assert "has, unlike the model, 24 weight(s)" in refused(capsys, argv)


def broken(adapter, folder, **changed):
    """A copy of the folder with other values in adapter_config.json."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    return folder


def loading_says(folder, base=None):
    with pytest.raises(UserError) as caught:
        load_pretrained_model(str(folder), base and str(base), device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base_model_name_or_path": None}, "does not say on which model it was trained; name it with --model-base"),
        (
            {"base_model_name_or_path": "/no/such"},
            "it was trained on /no/such, which is not there",
        ),
        ({"peft_type": "IA3"}, "holds adapters of peft_type 'IA3'; only LORA is read"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"r": 2}, "has shape [4, 64], the model wants [2, 64]"),
        ({"target_modules": ["fc1"]}, "fits no layer of its base"),
        ({"target_modules": ["q_proj"]}, "has, unlike the model, 24 weight(s)"),
    ],
)
def test_adapter_folders_that_cannot_be_used(adapter, tmp_path, changed, said):
    assert said in loading_says(broken(adapter, tmp_path / "a", **changed))


def test_torn_adapter_files(adapter, tmp_path):
    for name, said in (
        ("adapter_model.safetensors", "has no adapter_model.safetensors or .bin; was it copied as a whole?"),
        ("non_lora_trainables.safetensors", None),
    ):
        folder = broken(adapter, tmp_path / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert "cannot be read" in loading_says(folder)
        (folder / name).unlink()
        if said:
            assert said in loading_says(folder)
    load_pretrained_model(str(folder), device="cpu")  # the .bin is there still
    (folder / "non_lora_trainables.bin").unlink()
    assert "has no non_lora_trainables.bin, which holds the projector" in loading_says(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    assert "not JSON" in loading_says(folder)


def test_a_base_that_does_not_match(world, adapter, tmp_path):
    for name, value in (("vocab_size", 333), ("hidden_size", 48), ("num_hidden_layers", 3)):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((world.llm / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        said = loading_says(adapter, folder)
        assert f"was trained on a model with {name} {config[name]}, but its base {folder} has {value}" in said
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert f"was trained on a llama model, but its base {folder} is a mistral model" in loading_says(adapter, folder)
    assert "--model-base names no/such/folder, which is not there" in loading_says(adapter, "no/such/folder")
    assert f"its base {adapter} is an adapter itself" in loading_says(adapter, adapter)


def test_a_command_ends_with_that_line(adapter, tmp_path, capsys):
    folder = broken(adapter, tmp_path / "a", base_model_name_or_path="/no/such")
    assert cli.main(["chat", "--model-path", str(folder), "--prompt", "hello", "--device", "cpu"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert line.endswith("it was trained on /no/such, which is not there; name the model with --model-base")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--lora_r", "8"], "was trained with --lora_r 4, now 8: set it as it was, or choose another --output_dir"),
        (["--lora_alpha", "9"], "was trained with --lora_alpha 8, now 9"),
        (["--lora_target_modules", "v_proj,q_proj"], "--lora_target_modules [], now ['q_proj', 'v_proj']"),
        (["--lora_bias", "all"], "--lora_bias none, now all"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_not_gone_on_from(world, adapter, tmp_path, capsys, extra, said):
    torn = tmp_path / "torn"
    shutil.copytree(adapter, torn)
    (torn / checkpoint.SUMMARY).unlink()
    assert said in refused(capsys, world.flags("skip", torn, *LORA, *extra))
    assert "was trained with --lora_enable True: set it as it was" in refused(
        capsys, world.flags("skip", torn, "--max_steps", "4")
    )


def test_a_finished_run_is_not_the_one_with_other_adapters(world, adapter, capsys):
    line = refused(capsys, world.flags("skip", adapter, *LORA, "--lora_dropout", "0.2"))
    assert "holds a finished run with other settings (lora was {" in line
    run(world.flags("skip", adapter, *LORA, "--save_strategy", "steps", "--save_steps", "2"))


def test_full_checkpoints_of_older_runs_have_no_record_of_adapters():
    lora.refuse_other({}, {"lora": None}, "checkpoint-4")
    with pytest.raises(UserError, match="checkpoint-4 was trained without --lora_enable True"):
        lora.refuse_other({"lora": None}, {"lora": {"r": 4}}, "checkpoint-4")


def test_overwriting_takes_the_adapters_away(world, adapter, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(adapter, folder)
    args = SimpleNamespace(
        output_dir=str(folder), resume_from_checkpoint=None, overwrite_output_dir=True, should_save=True
    )
    resume.plan(args, {})
    left = {path.name for path in folder.iterdir()}
    assert not {name for name in left if name.startswith(("adapter", "non_lora", "checkpoint"))}
