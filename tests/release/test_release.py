"""`llava-sv release`: what the folder holds, that it loads and answers as the checkpoint does, and what is refused."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llava_sv import cli
from llava_sv.eval.identity import identity
from llava_sv.generation import load_for_inference, make_batch, user_turn
from llava_sv.model.builder import load_pretrained_model
from llava_sv.release import assemble, smoke
from llava_sv.release import release as module
from llava_sv.release.portable import portable_name, without_local
from tests.checkpoints import SKIP, save_checkpoint
from tests.release.card_runs import row
from tests.release.releases import contents, edit_json, release, verify
from tests.train.lora_runs import FAMILIES, LORA, logits, run
from tests.train.tiny import World

NEVER = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "runs")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """OUTPUT as training leaves it, with things that nobody should be sent."""
    folder = save_checkpoint(tmp_path_factory.mktemp("release") / "tiny-skip", SKIP, seed=2)
    for name in NEVER[:-1]:
        (folder / name).write_bytes(b"private")
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("private")
    return folder


@pytest.fixture(scope="module")
def released(checkpoint, tmp_path_factory):
    """(release with its smoke test, its report)."""
    folder = tmp_path_factory.mktemp("released")
    report = folder / "report.json"
    words = [
        checkpoint,
        "--out",
        folder / "out",
        "--json",
        report,
        "--license",
        "apache-2.0",
        "--base-license",
        "x=mit",
    ]
    assert cli.main(["release", *map(str, words)]) == 0
    return folder / "out", json.loads(report.read_text())


def error(capsys):
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line.removeprefix("error: ")


def same_tensors(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def weights(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def test_what_it_holds(released, checkpoint):
    out, report = released
    names = {path.name for path in out.iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert names - code == {
        *("config.json", "generation_config.json", "model.safetensors", "manifest.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("preprocessor_config.json", "processor_config.json"),
    }
    assert "modeling_llava_sv.py" in code
    assert set(report["files"]) == names - {"manifest.json"}
    same_tensors(weights(out), weights(checkpoint))
    for path in out.iterdir():
        data = path.read_bytes()
        assert b"private" not in data
        if path.suffix != ".safetensors":
            assert not re.search(rb"/tmp/|/root/|/home/", data), f"{path.name} names a folder of this machine"
    config = json.loads((out / "config.json").read_text())
    assert config["mm_vision_tower"] == "clip"
    assert list(config) == sorted(config)
    assert "| these weights | apache-2.0 |" in (out / "README.md").read_text()
    assert "license: apache-2.0" in (out / "README.md").read_text()
    assert "| x | mit |" in (out / "README.md").read_text()


def test_the_smoke_test_saw_it_load_both_ways(released):
    _, report = released
    forms = report["smoke_test"]["forms"]
    package, bare = forms["with llava_sv"], forms["by trust_remote_code, without llava_sv"]
    assert package["class"] == "llava_sv.LlavaLlamaForCausalLM"
    assert bare["class"] == "transformers_modules.LlavaLlamaForCausalLM"
    assert [seen["largest_difference"] for seen in (package, bare)] == [0, 0]
    assert {seen["text"] for seen in (package, bare)} == {report["smoke_test"]["text"]}
    assert bare["loaded_by"] == "AutoModelForImageTextToText"


def test_verify_finds_it_whole(released, capsys):
    assert verify(released[0]) == 0
    assert ": whole (" in capsys.readouterr().out


def test_the_same_checkpoint_gives_the_same_bytes(released, checkpoint, tmp_path, monkeypatch):
    flags = ["--license", "apache-2.0", "--base-license", "x=mit"]
    moved = tmp_path / "elsewhere" / checkpoint.name
    shutil.copytree(checkpoint, moved)
    for path in moved.iterdir():
        os.utime(path, (time.time() + 1000, 7))
    monkeypatch.chdir(tmp_path)
    assert release(Path("elsewhere") / checkpoint.name, Path("again"), *flags) == 0
    first, again = contents(released[0]), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    for name in first:
        assert first[name] == again[name], name


def test_chat_with_a_release_whose_checkpoint_is_gone(checkpoint, tmp_path, monkeypatch, capsys):
    gone = shutil.copytree(checkpoint, tmp_path / "run" / "gone")
    assert release(gone, tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "run")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    monkeypatch.chdir("/")
    words = [
        "--image-file",
        tmp_path / "red.png",
        "--prompt",
        "What colour?",
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
    ]
    answers = []
    for model in (checkpoint, tmp_path / "out"):
        capsys.readouterr()
        assert cli.main(["chat", "--model-path", str(model), *map(str, words)]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0].strip()


def test_shards_and_another_type(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert release(checkpoint, out, "--dtype", "bfloat16", "--shard-size", "40KB", "--name", "my model") == 0
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == set(weights(out))
    same_tensors(weights(out), {name: value.bfloat16() for name, value in weights(checkpoint).items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert row((out / "README.md").read_text(), "Weights stored as") == ["bfloat16"]
    assert "llava-sv chat --model-path 'my model' --image-file" in (out / "README.md").read_text()
    assert json.loads((out / "manifest.json").read_text())["name"] == "my model"
    assert (out / "README.md").read_text().count("# my model\n") == 1
    _, model, _, _ = load_pretrained_model(str(out), device="cpu")
    _, wanted, _, _ = load_pretrained_model(str(checkpoint), device="cpu", torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    # layers lie in their order, whatever file they came from
    names = [name for shard in shards for name in safe_open(shard, "pt").keys()]  # noqa: SIM118
    layers = [int(re.findall(r"^model\.layers\.(\d+)", name)[0]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(adapters of a short LoRA run, their base)."""
    folder = tmp_path_factory.mktemp("lora")
    world = World(folder)
    run(world.flags("skip", folder / "my-lora", *LORA))
    return folder / "my-lora", world.llm


def test_adapters_are_merged_first(adapter, tmp_path, capsys):
    folder, base = adapter
    out = tmp_path / "out"
    assert release(folder, out) == 0
    assert f"my-lora: releasing {folder}, its adapters merged into {base}" in capsys.readouterr().out
    assert not [path for path in out.iterdir() if "adapter" in path.name or path.suffix == ".bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing temporary is left"
    assert verify(out) == 0
    of_release, of_run = (load_pretrained_model(str(path), device="cpu") for path in (out, folder))
    assert torch.equal(logits(of_release[1], of_release[2]), logits(of_run[1], of_run[2]))
    card = (out / "README.md").read_text()
    assert "adapters or a projector" not in card, "the card is of the merged model"
    assert row(card, r"**all**") == [f"**{sum(value.numel() for value in of_release[1].state_dict().values()):,}**"]


def test_reports_of_adapters_and_of_their_release_are_both_its_own(adapter, made, tmp_path, capsys):
    folder, out = adapter[0], tmp_path / "out"
    assert release(folder, out) == 0
    report = tmp_path / "report.json"
    for of in (folder, out):
        values = json.loads(made.skip.read_text()) | {"checkpoint": identity(of), "model_path": "x"}
        report.write_text(json.dumps(values))
        assert release(folder, tmp_path / "again", "--force", "--eval", report) == 0
        card = (tmp_path / "again" / "README.md").read_text()
        assert row(card, "Of this checkpoint") == ["yes, by its fingerprint"]
    report.write_text(json.dumps(values | {"checkpoint": {**identity(out), "weights": "0"}}))
    assert release(folder, tmp_path / "other", "--eval", report) == 2
    assert "is a report of another checkpoint" in error(capsys)


def test_a_base_that_is_not_asked_for_or_not_there(checkpoint, adapter, tmp_path, capsys):
    assert release(checkpoint, tmp_path / "out", "--base", adapter[1]) == 2
    assert error(capsys).startswith(f"--base {adapter[1]}: is for LoRA adapters, and {checkpoint} holds none")
    assert release(adapter[0], tmp_path / "out", "--base", "/no/such") == 2
    assert "names /no/such, which is not there" in error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_inside_a_run(checkpoint, tmp_path):
    inside = tmp_path / "my-run" / "checkpoint-3"
    shutil.copytree(checkpoint, inside)
    assert release(inside, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["name"] == "my-run-checkpoint-3"


def emptied(folder, *extra):
    """A folder with the config of a model and the named files, no weights."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for name in extra:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def torn(folder):
    (folder / "complete.json").write_text(json.dumps({"files": {"optimizer_states.pt": 5}}))


def without_encoder(folder):
    edit_json(
        folder / "config.json", lambda values: values.update(vision_config=None, mm_vision_tower=str(folder / "clip"))
    )
    shutil.copytree(folder.parent / "clip", folder / "clip")


def unfinished(folder):
    emptied(folder)
    inside = folder / "checkpoint-7"
    inside.mkdir()
    (inside / "complete.json").write_text(json.dumps({"files": {}}))


def rename_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.nrom.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (shutil.rmtree, "no such checkpoint folder: {folder}"),
        (
            lambda f: (shutil.rmtree(f), f.write_text("")),
            "checkpoint {folder}: is a file; give the folder that it is in",
        ),
        (
            lambda f: emptied(f, "mm_projector.bin"),
            "checkpoint {folder}: holds a projector alone, and a release is a whole",
        ),
        (
            lambda f: emptied(f, "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"),
            "checkpoint {folder}: holds DeepSpeed's partitions (global_step5) and no whole weights; run python "
            "{folder}/zero_to_fp32.py {folder} {folder} --safe_serialization first",
        ),
        (emptied, "checkpoint {folder}: has no weights (model.safetensors or "),
        (
            unfinished,
            "checkpoint {folder}: has no weights of its own, the run has not finished; release {folder}/checkpoint-7",
        ),
        (torn, "checkpoint {folder}: is not complete: optimizer_states.pt is missing; release another"),
        (
            without_encoder,
            "checkpoint {folder}: names its encoder ({folder}/clip) instead of holding it; run llava-sv convert",
        ),
        (rename_a_weight, "checkpoint {folder}: lacks 1 weight(s): model.norm.weight; does config.json"),
        (lambda f: (f / "config.json").unlink(), "checkpoint {folder}: has no config.json"),
        (
            lambda f: edit_json(f / "config.json", lambda v: v.pop("conv_template")),
            "config.json names no conv_template; say",
        ),
        (
            lambda f: edit_json(f / "config.json", lambda v: v.update(quantization_config={"load_in_4bit": True})),
            "checkpoint {folder}: holds quantised weights",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer {folder}: cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "weights {folder}/model.safetensors: cannot be read"),
    ],
)
def test_what_cannot_be_released(checkpoint, tmp_path, capsys, break_it, said):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "run"))
    shutil.copytree(checkpoint.parent / f"{checkpoint.name}-bases" / "clip", tmp_path / "clip")
    break_it(folder)
    assert release(folder, tmp_path / "out") == 2
    assert said.format(folder=folder) in error(capsys)
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "clip"}, "nothing is left of it"


def test_a_template_where_the_checkpoint_names_none(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    edit_json(folder / "config.json", lambda values: values.pop("conv_template"))
    assert release(folder, tmp_path / "out", "--conv-template", "llama_3") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["conv_template"] == "llama_3"
    assert row((tmp_path / "out" / "README.md").read_text(), "Conversation template") == ["llama_3"]
    assert identity(tmp_path / "out") == identity(folder, "llama_3"), "a report of the release goes into its next card"


def test_a_checkpoint_without_generation_config_stops_where_its_turns_end(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    (folder / "generation_config.json").unlink()
    assert release(folder, tmp_path / "out") == 0
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path / "out"), device="cpu")
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|eot_id|>")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}"], "--out DIR is needed"),
        (["{run}", "--out", "{new}", "--shard-size", "big"], "--shard-size big: cannot be read"),
        (["{run}", "--out", "{new}", "--shard-size", "0"], "--shard-size 0: cannot be read"),
        (["{run}", "--push-to-hub", "a/b", "--license", "mit"], "--license goes with --out DIR"),
        (["{run}", "--push-to-hub", "a/b", "--no-smoke-test"], "--no-smoke-test goes with --out DIR"),
        (["{run}", "--out", "{new}", "--upload"], "--upload goes with --push-to-hub"),
        (["{run}", "--out", "{new}", "--public"], "--public goes with --push-to-hub"),
        (["{run}", "--out", "{new}", "--eval", "{new}/x"], "--eval {new}/x: no such file"),
        (["{run}", "--out", "{new}", "--card", "{new}/x"], "--card {new}/x: no such file"),
        (["{run}", "--out", "{new}", "--base-license", "=mit"], "--base-license =mit: write ID, or NAME=ID"),
        (
            ["{run}", "--out", "{new}", "--base-license", "mit"],
            "the run does not say which language model it began with",
        ),
        (["{run}", "--out", "{new}", "--name", " "], "--name: is empty"),
        (["{run}", "--out", "{new}", "--json", "{run}/config.json"], "--json {run}/config.json: exists"),
        (["{run}", "--out", "{run}", "--force"], "--out {run}: is or holds the checkpoint"),
        (["{run}", "--out", "{full}"], "--out {full}: exists; choose another, or pass --force"),
        (["{run}", "--out", "{new}", "--push-to-hub", "nobody"], "--push-to-hub nobody: not OWNER/NAME"),
        (["{run}", "--push-to-hub", "me/model"], "{run}: is no release (no manifest.json)"),
        (["{run}", "--out", "{new}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{run}", "--out", "{new}", "--device", "abacus"], "--device abacus: unknown device"),
    ],
)
def test_flags_that_cannot_be_meant(checkpoint, tmp_path, capsys, words, said):
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    names = {"run": checkpoint, "new": tmp_path / "new", "full": full}
    assert cli.main(["release", *(word.format(**names) for word in words)]) == 2
    assert said.format(**names) in error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_force_replaces_and_a_stop_does_not(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "write_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert release(checkpoint, out, "--force") == 130
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert list(tmp_path.iterdir()) == [out]
    assert release(checkpoint, out, "--force") == 0
    assert verify(out) == 0


def test_a_full_disk_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    assert release(checkpoint, tmp_path / "out") == 74
    assert "0.0 GB free; make room" in error(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"largest_difference": 0.5}, "logits differ by 0.5 from the checkpoint's (at most "),
        ({"largest_difference": float("nan")}, "logits differ by nan from"),
        ({"text": "no"}, "it answers 'no', the checkpoint '"),
        ({"shape": [1, 2]}, "logits are of shape [1, 2], the checkpoint's of ["),
    ],
)
def test_a_release_that_answers_otherwise_is_not_made(checkpoint, tmp_path, monkeypatch, capsys, change, said):
    def seen(folder, place, form, without, device):
        wanted = load_file(place / "reference.safetensors")["logits"]
        assert (folder / "manifest.json").is_file(), "the finished folder is what is tested"
        right = {"shape": list(wanted.shape), "largest_difference": 0.0, "text": texts[0], "class": "x"}
        return {**right, **(change if without else {})}

    texts = [smoke.answer_of(str(checkpoint), None, None, "cpu", "llama_3").text]
    monkeypatch.setattr(smoke, "_in_clean_process", seen)
    assert cli.main(["release", str(checkpoint), "--out", str(tmp_path / "out")]) == 2
    line = error(capsys)
    assert line.startswith(f"smoke test, loaded by trust_remote_code, without llava_sv: {said}")
    assert line.endswith("; nothing was written")
    assert not list(tmp_path.iterdir())


def test_code_that_does_not_load_fails_the_smoke_test(checkpoint, tmp_path, monkeypatch, capsys):
    """A real clean process, the one without the package."""
    monkeypatch.setattr(smoke, "FORMS", {"without": "llava_sv"})
    real = assemble.write_code

    def broken(folder):
        real(folder)
        code = folder / "sv_model_splice.py"
        code.write_text(code.read_text() + "\nraise RuntimeError('broken on purpose')\n")

    monkeypatch.setattr(assemble, "write_code", broken)
    out, report = tmp_path / "out", tmp_path / "report.json"
    assert cli.main(["release", str(checkpoint), "--out", str(out), "--json", str(report)]) == 2
    assert error(capsys) == "smoke test, loaded without: RuntimeError: broken on purpose; nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    values = json.loads(report.read_text())
    assert values["folder"] is None
    assert any("sv_model_splice.py" in line for line in values["log"])


def test_a_clean_process_sees_no_secrets_and_no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = smoke._environment(tmp_path)
    assert "hf_secret" not in environment.values()
    assert "PYTHONPATH" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    repository = Path(cli.__file__).parents[1]
    assert str(repository) not in smoke._import_path(bare=True)
    assert str(repository) in smoke._import_path(bare=False)


def test_a_name_that_stands_for_a_path():
    wanted = {
        "openai/clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
        "/data/models/clip-vit-large-patch14-336/": "clip-vit-large-patch14-336",
        "playground/tiny/clip": "clip",
        "checkpoints/clip": "clip",
        "../google/siglip": "siglip",
        "~/x/y": "y",
        "C:\\models\\clip": "clip",
        "/h/hub/models--openai--clip-vit-base/snapshots/0123abc": "openai/clip-vit-base",
        None: None,
    }
    assert {path: portable_name(path) for path in wanted} == wanted


def test_paths_are_taken_out_of_settings():
    dropped: list[str] = []
    values = {
        "_name_or_path": "x",
        "a": {"cache": "/home/me/x", "b": "/", "c": ["/home/me"]},
        "d": "a/b",
        "is_local": True,
    }
    assert without_local(values, dropped) == {"a": {"b": "/", "c": ["/home/me"]}, "d": "a/b"}
    assert dropped == ["a.cache"]


def test_a_path_of_this_machine_in_a_setting_is_said(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    edit_json(folder / "config.json", lambda values: values.update(cached="/home/me/cache/x", mm_vision_tower="/a/b/c"))
    assert release(folder, tmp_path / "out") == 0
    note = "note: config.json: cached held a path of this machine and was left out"
    assert note in capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_vision_tower"] == "c"
    assert "/home/me" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("lora", [False, True])
def test_every_family_loads_and_answers_alike(tmp_path, family, lora):
    world = World(tmp_path)
    flags = ["--mm_family", family, *FAMILIES[family]]
    run(world.flags("skip", tmp_path / "run", *(LORA if lora else ["--max_steps", "3"]), *flags))
    report = tmp_path / "report.json"
    assert cli.main(["release", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--json", str(report)]) == 0
    forms = json.loads(report.read_text())["smoke_test"]["forms"]
    assert [seen["largest_difference"] for seen in forms.values()] == [0, 0]
    assert verify(tmp_path / "out") == 0


def test_the_smoke_tests_picture_is_seen(checkpoint):
    """Another picture gives other logits: the comparison is not of text alone."""
    wanted = smoke.answer_of(str(checkpoint), None, None, "cpu", "llama_3")
    assistant = load_for_inference(str(checkpoint), device="cpu")
    picture = Image.new("RGB", smoke.picture().size, (9, 9, 9))
    batch = make_batch(assistant, [[user_turn(smoke.QUESTION, 1)]], [[picture]])
    with torch.inference_mode():
        other = assistant.model(batch.input_ids, images=batch.images, image_sizes=batch.image_sizes).logits[0]
    assert (other - wanted.logits).abs().max() > 0.1
