"""Everything that `llava-sv convert SRC --to` refuses: one line, exit code 2, and nothing left behind."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.release import converting, probe
from llava_sv.release import weights as files_of_weights
from llava_sv.release.flags import shard_bytes
from tests.release.hf_checkpoints import make_hf, rewrite
from tests.release.test_convert_hf import convert


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_hf(folder / "hf", shards="60KB")
    make_hf(folder / "next", is_next=True)
    make_hf(folder / "siglip", vision="siglip")
    assert convert(folder / "hf", "sv", folder / "sv", "--no-check") == 0
    return folder


@pytest.fixture
def refused(made, tmp_path, capsys):
    """(source's kind, what to do to a copy of it, other words) -> the one line that is said."""

    def refuse(kind, to, change=None, *words, out="out"):
        source = tmp_path / "source"
        shutil.copytree(made / kind, source)
        if change is not None:
            change(source)
        capsys.readouterr()
        assert convert(source, to, tmp_path / out, *words) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1, error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"], "nothing is left behind"
        return error[0]

    return refuse


def config(**values):
    return lambda folder: rewrite(folder, "config.json", **values)


def nested(part, **values):
    def change(folder):
        whole = json.loads((folder / "config.json").read_text())
        rewrite(folder, "config.json", **{part: {**whole[part], **values}})

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def weights(change):
    """Change the tensors of the source's last shard, and list them anew."""

    def apply(folder):
        path = sorted(folder.glob("model*.safetensors"))[-1]
        values = load_file(path)
        change(values)
        save_file(values, path, metadata={"format": "pt"})

    return apply


def with_new_key(values):
    values["language_model.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)


def with_foreign_key(values):
    values["audio_tower.weight"] = torch.zeros(2, 2)


def reshape(values):
    name = next(name for name in values if name.endswith("pre_layrnorm.weight"))
    values[name] = torch.zeros(5)


def drop(values):
    del values[next(name for name in values if name.endswith("pre_layrnorm.weight"))]


CASES = [
    ("hf", "sv", remove("config.json"), "has no config.json"),
    ("hf", "sv", write("config.json", "{"), "config.json, line 1, column 2: not JSON"),
    ("hf", "sv", write("config.json", "[]"), "holds a list, not a config's fields"),
    ("hf", "sv", config(model_type="llava_onevision"), "model_type 'llava_onevision' is not converted"),
    ("hf", "sv", config(model_type="video_llava"), "model_type 'video_llava' is not converted"),
    ("hf", "sv", config(text_config=None), "model_type 'llava' is in no layout that is known"),
    ("hf", "sv", config(model_type="bert", text_config=None), "model_type 'bert' is in no layout that is known"),
    ("hf", "sv", nested("text_config", model_type="gemma"), "text_config.model_type is 'gemma'; known here: llama"),
    ("hf", "sv", nested("vision_config", model_type="pixtral"), "vision_config.model_type is 'pixtral'; known here"),
    ("hf", "sv", config(vision_feature_layer=[-2, -1]), "vision_feature_layer [-2, -1]: features of several layers"),
    ("hf", "sv", config(vision_feature_layer=-9), "mm_vision_select_layer: this encoder has no layer -9"),
    ("hf", "sv", config(projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
    ("hf", "sv", config(multimodal_projector_bias=False), "multimodal_projector_bias false"),
    ("hf", "sv", config(vision_feature_select_strategy="odd"), "cannot be read as a LlavaConfig"),
    ("siglip", "sv", config(vision_feature_select_strategy="default"), "drops the first token, which of siglip"),
    ("next", "sv", config(vision_feature_select_strategy="full"), "tiles have no place for"),
    ("next", "sv", config(image_grid_pinpoints=[[32, 64]]), "image_grid_pinpoints are [[32, 64]] in config.json and"),
    ("hf", "sv", remove("processor_config.json"), "no such file: "),
    ("hf", "sv", remove("tokenizer.json"), "tokenizer "),
    ("hf", "sv", write("tokenizer.json", "{"), "tokenizer "),
    ("hf", "sv", write("generation_config.json", "[1]"), "generation_config.json: holds a list, not settings"),
    ("hf", "sv", remove("model-00002-of-00005.safetensors"), "lacks model-00002-of-00005.safetensors, which"),
    ("hf", "sv", write("model-00002-of-00005.safetensors", "torn"), "model-00002-of-00005.safetensors: cannot be read"),
    ("hf", "sv", write("model.safetensors.index.json", "{}"), "has no weight_map"),
    ("hf", "sv", weights(with_foreign_key), "has a weight of no part of a LLaVA, audio_tower.weight"),
    ("hf", "sv", weights(with_new_key), "has, unlike its config, 1 weight(s): model.layers.9.mlp.up_proj.weight"),
    ("hf", "sv", weights(drop), "lacks 1 weight(s): model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"),
    ("hf", "sv", weights(reshape), "has in another shape than its config says 1 weight(s)"),
    ("hf", "hf", None, "is in layout hf already"),
    ("sv", "sv", None, "is in layout sv already; pass --dtype or --shard-size"),
    ("sv", "hf", config(mm_projector_type="linear"), "lacks 2 weight(s): model.mm_projector.bias, "),
    ("sv", "hf", config(image_aspect_ratio="odd"), "image_aspect_ratio: unknown 'odd'"),
    ("sv", "hf", config(mm_family="llava_hd"), "has no tiles by grid (image_aspect_ratio 'square')"),
    ("sv", "hf", write("preprocessor_config.json", "{"), "cannot read the image processor"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "to", "change", "said"), CASES, ids=[case[3][:40] for case in CASES])
def test_what_is_refused(refused, kind, to, change, said):
    assert said in refused(kind, to, change, "--no-check")


FLAGS = [
    ("hf", "sv", ("--drop-skip",), "--drop-skip: "),
    ("sv", "hf", ("--sv_num_retained", "4"), "--to hf: only this project's layout, sv, holds a model that skips"),
    ("hf", "sv", ("--sv_num_retained", "4", "--drop-skip"), "contradict each other"),
    ("hf", "sv", ("--sv_num_retained", "99"), "99"),
    ("hf", "sv", ("--sv_merge", "maybe"), "expected True or False, got 'maybe'"),
    ("hf", "sv", ("--dtype", "int8"), "invalid choice: 'int8'"),
    ("hf", "sv", ("--shard-size", "five"), "--shard-size five: cannot be read"),
    ("hf", "sv", ("--conv-template", "odd"), "unknown conversation template 'odd'"),
    ("hf", "sv", ("--base", "other"), "--base: "),
    ("hf", "sv", ("--vision-tower", "other"), "--vision-tower: "),
    ("hf", "llava", (), "config.json names no mm_vision_tower"),
]


@pytest.mark.parametrize(("kind", "to", "words", "said"), FLAGS, ids=[" ".join(case[2]) or "llava" for case in FLAGS])
def test_flags_that_do_not_go_together(refused, kind, to, words, said):
    assert said in refused(kind, to, None, *words)


def test_where_it_may_be_written(made, tmp_path, capsys):
    def line(*words):
        capsys.readouterr()
        assert cli.main(["convert", *map(str, words)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        return error[0]

    source, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(made / "hf", source)
    (out / "mine").mkdir(parents=True)
    assert "exists; choose another, or pass --force" in line(source, "--to", "sv", "--out", out)
    assert "is or lies in the source" in line(source, "--to", "sv", "--out", source / "sv")
    assert "is or lies in the source" in line(source, "--to", "sv", "--out", source, "--force")
    assert "is or holds the source" in line(source, "--to", "sv", "--out", tmp_path, "--force")
    assert "no such folder" in line(tmp_path / "none", "--to", "sv", "--out", tmp_path / "x")
    assert "is a file" in line(source / "config.json", "--to", "sv", "--out", tmp_path / "x")
    assert "needs --to" in line(source, "--out", tmp_path / "x")
    assert "needs SRC" in line("--to", "sv", "--out", tmp_path / "x")
    assert "--to needs --out" in line(source, "--to", "sv")
    assert "SRC goes with --to" in line(source, "--universal", "a")
    assert "--sv_merge goes with --to" in line("--merge-lora", "a", "--out", "b", "--sv_merge", "True")
    assert "is a folder; name a file" in line(source, "--to", "sv", "--out", tmp_path / "x", "--json", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert convert(source, "sv", out, "--force", "--no-check") == 0
    assert not (out / "mine").exists()
    assert (out / "model.safetensors.index.json").is_file()


def test_parts_of_a_checkpoint_say_how_to_become_whole(made, tmp_path, capsys):
    for name, said in (("adapter_config.json", "--merge-lora"), ("mm_projector.bin", "holds a projector alone")):
        source = tmp_path / name.partition(".")[0]
        source.mkdir()
        shutil.copy(made / "sv" / "config.json", source)
        (source / name).write_text("{}")
        assert convert(source, "hf", tmp_path / "out") == 2
        assert said in capsys.readouterr().err


def test_a_result_that_answers_otherwise_is_refused(made, tmp_path, capsys, monkeypatch):
    """The check compares what is on the disk: weights one by one, and logits of both folders."""
    ask = probe.ask

    def other(folder, layout, *rest, **how):
        answer = ask(folder, layout, *rest, **how)
        answer.logits = answer.logits + (3e-3 if layout == "sv" else 0.0)
        return answer

    monkeypatch.setattr(probe, "ask", other)
    assert convert(made / "hf", "sv", tmp_path / "out") == 2
    assert "logits of source and result are up to 0.003 apart, and 0.0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_are_compared_one_by_one(made, tmp_path, capsys, monkeypatch):
    write_weights = converting._layout_module("to", "sv").write_weights

    def spoil(folder, *rest):
        names = write_weights(folder, *rest)
        path = folder / names[0]
        values = load_file(path)
        first = sorted(values)[0]
        values[first] = values[first] + 1e-6
        save_file(values, path, metadata={"format": "pt"})
        return names

    monkeypatch.setattr(converting._layout_module("to", "sv"), "write_weights", spoil)
    assert convert(made / "hf", "sv", tmp_path / "out") == 2
    assert "is not what model-0000" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_each_folder_is_loaded_once(made, tmp_path, capsys, monkeypatch):
    """Also where two tokenizers disagree about the prompt: the result is then asked what the source was."""
    ask, asked, ids_of = probe.ask, [], probe.tokenizer_image_token

    def counted(folder, layout, *rest, **how):
        asked.append(layout)
        return ask(folder, layout, *rest, **how)

    monkeypatch.setattr(probe, "ask", counted)
    monkeypatch.setattr(probe, "tokenizer_image_token", lambda *words: [*ids_of(*words), 5])
    assert convert(made / "hf", "sv", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "logits are compared on the source's ids" in out
    assert "logits are at most" in out
    assert asked == ["hf", "sv"]


def weight(part, value):
    """Put a number into the first weight whose name ends with `part`."""

    def change(folder):
        for path in sorted(folder.glob("*.safetensors")):
            values = load_file(path)
            name = next((name for name in values if name.endswith(part)), None)
            if name:
                values[name].view(-1)[0] = value
                save_file(values, path, metadata={"format": "pt"})
                return
        raise AssertionError(part)

    return change


def test_a_number_that_the_type_does_not_hold(refused):
    said = refused("hf", "sv", weight("layers.1.mlp.up_proj.weight", 1e6), "--no-check", "--dtype", "float16")
    assert "model.layers.1.mlp.up_proj.weight has values up to 1e+06, more than float16 holds" in said


@pytest.mark.parametrize("flags", [(), ("--sv_num_retained", "4", "--sv_num_skipped", "5")])
def test_weights_that_are_no_numbers(refused, flags):
    """NaN equals NaN bit for bit, and a model made to skip is compared with nothing: it is refused all the same."""
    said = refused("hf", "sv", weight("layers.1.mlp.up_proj.weight", float("nan")), *flags)
    assert "logits are NaN or infinite (weights: NaN or infinite values in model.layers.1.mlp.up_proj.weight)" in said


def test_a_file_that_cannot_be_written_whole(made, tmp_path, capsys, monkeypatch):
    """Under a real limit on a file's size; then on a disk that is full, as the library says it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert convert(made / "hf", "sv", tmp_path / "out", "--shard-size", "1GB") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"of the result {tmp_path / 'out'}/model.safetensors: cannot be written (File too large)" in said[0]

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files_of_weights, "save_file", full)
    assert convert(made / "hf", "sv", tmp_path / "out") == 74
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_cannot_ask_is_a_line(refused):
    assert "transformers cannot ask it (Image features and image tokens" in refused(
        "hf", "sv", config(image_token_index=7)
    )


def test_adapters_beside_a_whole_model(refused):
    said = refused("hf", "sv", lambda folder: (folder / "adapter_config.json").write_text("{}"), "--no-check")
    assert "holds adapters (adapter_config.json) beside a whole model" in said


def test_a_link_to_nothing_is_no_place(made, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert convert(made / "hf", "sv", tmp_path / "out", "--no-check") == 2
    assert "is a link to nothing" in capsys.readouterr().err


def test_nothing_is_loaded_that_does_not_fit(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(probe, "ask", None)
    assert convert(made / "hf", "sv", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "check: 80 weights are equal" in out
    assert "logits are not compared: that takes 0.0 GB of memory, and 0.0 GB are free" in out


ENDED = """
import os, signal, sys
from llava_sv import cli
from llava_sv.release import to_sv

def stop(*_):
    os.kill(os.getpid(), signal.{signal})
    import time
    time.sleep(60)

to_sv.write_weights = stop
sys.exit(cli.main(["convert", {source!r}, "--to", "sv", "--out", {out!r}, "--force"]))
"""


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGKILL", -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_what_was_there(made, tmp_path, name, code):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("old")
    script = ENDED.format(signal=name, source=str(made / "hf"), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr.decode()[-500:]
    assert [path.name for path in out.iterdir()] == ["mine"]
    if name != "SIGKILL":
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


PEAK = """
import resource, sys
from llava_sv import cli

def convert(source, to, out):
    assert cli.main(["convert", source, "--to", to, "--out", out, "--no-check"]) == 0

small, big, out = sys.argv[1:]
convert(small, "sv", out + "/small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(big, "sv", out + "/big")
convert(out + "/big", "hf", out + "/back")
print("grew", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units there")
def test_weights_pass_shard_by_shard(made, tmp_path):
    """168 MB in shards of 18: converting there and back takes a third of the whole at most."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
    big = make_hf(tmp_path / "big-hf", shards="18MB", text_fields={**sizes, "num_key_value_heads": 8})
    whole = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    assert len(list(big.glob("*.safetensors"))) >= 8
    words = [sys.executable, "-c", PEAK, str(made / "hf"), str(big), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    grew = int(done.stdout.split("grew")[1])
    assert grew < whole / 3, f"{grew / 1e6:.0f} of {whole / 1e6:.0f} MB"


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("5gib", 5 * 2**30), ("1.5MB", 1_500_000), ("700", 700), ("2K", 2000)]
)
def test_sizes_of_shards(text, size):
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB"])
def test_sizes_that_cannot_be_read(text):
    with pytest.raises(UserError, match="cannot be read; write a number"):
        shard_bytes(text)


def test_a_name_of_the_hub_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["convert", "nobody/none", "--to", "sv", "--out", str(tmp_path / "x")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: nobody/none: no such folder, and offline no copy of it was fetched before; fetch it")
    assert said.endswith(" where there is a network (hf download nobody/none), or give a folder")
