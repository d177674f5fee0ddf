"""`llava-sv convert --merge-lora`: the folder it writes, and everything that it refuses. Equal logits are compared by
tests/train/test_lora.py, for every family."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava_sv import cli
from llava_sv.model.builder import load_pretrained_model
from llava_sv.release import merge_lora as module
from tests.train.lora_runs import LORA, run
from tests.train.tiny import World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Random tiny bases and 16 records."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """OUTPUT of a short LoRA run."""
    output = tmp_path_factory.mktemp("adapter")
    run(world.flags("skip", output, *LORA))
    return output


def convert(*words):
    return cli.main(["convert", "--merge-lora", *map(str, words)])


def error(capsys):
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def test_a_whole_checkpoint_in_the_usual_layout(world, adapter, tmp_path, capsys):
    full = tmp_path / "full"
    run(world.flags("skip", full, "--max_steps", "1"))
    out = tmp_path / "deep" / "merged"
    assert convert(adapter, "--base", world.llm, "--output", out) == 0
    assert f"{out}: {adapter} merged into its base" in capsys.readouterr().out
    ours = {path.name for path in out.iterdir()}
    of_training_only = {"train_summary.json", "metrics.jsonl", "loss.png", "training_args.bin"}
    assert ours == {path.name for path in full.iterdir()} - of_training_only
    assert list(out.parent.iterdir()) == [out], "nothing temporary is left"
    merged, usual = load_file(out / "model.safetensors"), load_file(full / "model.safetensors")
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in usual.items()}
    assert {value.dtype for value in merged.values()} == {torch.float32}
    config, config_of_full = (json.loads((folder / "config.json").read_text()) for folder in (out, full))
    assert config == config_of_full
    load_pretrained_model(str(out), device="cpu")


def test_what_exists_is_replaced_only_by_force(adapter, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert convert(adapter, "--output", out) == 0, "an empty folder is no loss"
    (out / "notes.txt").write_text("mine")
    assert convert(adapter, "--output", out) == 2
    assert error(capsys) == f"error: --output {out}: exists; choose another, or pass --force to replace it"
    assert (out / "notes.txt").exists()
    assert convert(adapter, "--output", out, "--force") == 0
    assert not (out / "notes.txt").exists()
    assert (out / "model.safetensors").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_a_stop_on_the_way_leaves_what_was_there(adapter, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    real = module.load_pretrained_model

    def loaded(*args, **kwargs):
        tokenizer, model, processor, length = real(*args, **kwargs)
        monkeypatch.setattr(tokenizer, "save_pretrained", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt()))
        return tokenizer, model, processor, length

    monkeypatch.setattr(module, "load_pretrained_model", loaded)
    with pytest.raises(KeyboardInterrupt):
        module.merge_lora(str(adapter), None, str(out), force=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_failing_second_renaming_brings_the_old_folder_back(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError), module.replacing_folder(out) as folder:
        folder.rmdir()
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{llm}", "--output", "{new}"], "--merge-lora {llm}: no adapter_config.json there"),
        (["no/such", "--output", "{new}"], "--merge-lora no/such: no adapter_config.json there"),
        (["{adapter}", "--output", "{adapter}", "--force"], "--output {adapter}: is or holds the adapter"),
        (["{adapter}", "--base", "{llm}", "--output", "{llm}", "--force"], "--output {llm}: is or holds the base"),
        (["{adapter}", "--output", "{file}", "--force"], "--output {file}: exists; choose a folder"),
        (["{adapter}", "--base", "/no/such", "--output", "{new}"], "--model-base names /no/such, which is not there"),
        (["{adapter}", "--base", "{clip}", "--output", "{new}"], "but its base {clip} is a clip_vision_model model"),
    ],
)
def test_what_cannot_be_merged(world, adapter, tmp_path, capsys, words, said):
    (tmp_path / "file").write_text("")
    names = {"llm": world.llm, "clip": world.clip, "adapter": adapter}
    names |= {"new": tmp_path / "new", "file": tmp_path / "file"}
    assert convert(*(word.format(**names) for word in words)) == 2
    assert said.format(**names) in error(capsys)
    assert not (tmp_path / "new").exists()
    assert (adapter / "adapter_config.json").exists()


def test_the_base_itself_is_never_overwritten_when_only_remembered(world, adapter, capsys):
    assert convert(adapter, "--output", world.llm, "--force") == 2
    assert f"--output {world.llm}: is or holds the base" in error(capsys)
    assert convert(adapter, "--output", world.folder, "--force") == 2
    assert f"--output {world.folder}: is or holds the base" in error(capsys)
    assert (world.clip / "config.json").exists()


def test_a_kind_of_conversion_must_be_named(capsys):
    assert cli.main(["convert", "--output", "x"]) == 2
    assert "one of the arguments --universal --merge-lora is required" in error(capsys)
    assert cli.main(["convert", "--merge-lora", "x"]) == 2
    assert "--merge-lora needs --output" in error(capsys)
    assert cli.main(["convert", "--universal", "x", "--output", "y"]) == 2
    assert "go with --merge-lora" in error(capsys)
