"""LoRA end to end on random tiny bases, by family: what trains, what is saved, and that every reader agrees."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_sv.errors import UserError
from llava_sv.model import adapters
from llava_sv.model.builder import load_pretrained_model
from llava_sv.model.quantization import KEPT
from llava_sv.serve.cli import main as chat
from llava_sv.train import build
from llava_sv.train.llava_trainer import split_parameters
from llava_sv.train.metrics import read_metrics
from tests.train.lora_runs import FAMILIES, LORA, built, logits, run

torch.set_num_threads(1)

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, world, tmp_path_factory):
    """(family, flags, OUTPUT, the model as it trained, what was printed)."""
    output = tmp_path_factory.mktemp(request.param)
    more = ["--mm_family", request.param, *FAMILIES[request.param], *LORA, "--mm_projector_lr", "2e-3"]
    argv = world.flags("skip", output, *more, "--save_strategy", "steps", "--save_steps", "2")
    model, printed = run(argv)
    return request.param, argv, output, model, printed


@pytest.fixture(scope="module")
def llava(world, tmp_path_factory):
    """OUTPUT of a run of family llava, for tests that need just one."""
    output = tmp_path_factory.mktemp("lora")
    run(world.flags("skip", output, *LORA))
    return output


def test_only_what_should_train_changes(trained):
    family, argv, _, model, printed = trained
    before = dict(built(argv)[0].named_parameters())
    after = dict(model.named_parameters())
    assert set(before) == set(after)
    tower = {id(p) for p, _ in model.get_vision_tower().used_parameters().values()} if family == "cos" else set()
    for name, value in after.items():
        expected = ".lora_" in name or "mm_projector" in name or id(value) in tower
        assert value.requires_grad is expected, name
        assert torch.equal(value, before[name]) is not expected, name
    counts = build.count_parameters(model)
    assert counts["language model"][1] == 0
    total, trains = counts["language model adapters"]
    # two layers of width 32, FFN 64, keys and values 16: rank times (in + out) of each
    assert (total, trains) == (4 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3),) * 2
    assert f"language model adapters {total:>14,} parameters, all train" in printed


def test_the_folder_is_small_and_whole(trained):
    _, _, output, model, _ = trained
    for folder in (output, output / "checkpoint-2"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"} <= names
        assert {"non_lora_trainables.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"} <= names
        assert not {"model.safetensors", "pytorch_model.bin"} & names
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ALL)
    assert config["inference_mode"] is True
    saved = {*load_file(output / "adapter_model.safetensors"), *load_file(output / "non_lora_trainables.safetensors")}
    wanted = {
        "base_model.model." + name.replace(".default.", ".") for name, p in model.named_parameters() if p.requires_grad
    }
    assert saved == wanted
    assert json.loads((output / "config.json").read_text())["skip_vision"]["num_skipped"] in (5, 6)


def test_every_reader_gives_the_same_logits(trained, tmp_path):
    from llava_sv.release.convert import main as convert

    _, _, output, model, _ = trained
    _, beside, processor, _ = load_pretrained_model(str(output), device="cpu", merge_lora=False)
    _, merged, _, _ = load_pretrained_model(str(output), device="cpu")
    assert convert(["--merge-lora", str(output), "--output", str(tmp_path / "whole")]) == 0
    _, whole, processor2, _ = load_pretrained_model(str(tmp_path / "whole"), device="cpu")
    assert adapters.is_attached(beside)
    assert not adapters.is_attached(merged)
    right = logits(model, processor)
    assert torch.equal(logits(beside, processor), right)
    torch.testing.assert_close(logits(merged, processor), right, atol=1e-5, rtol=0)
    assert torch.equal(logits(whole, processor2), logits(merged, processor))
    beside.disable_adapters()  # then another answer: they do something
    assert (logits(beside, processor) - right).abs().max() > 1e-3


def test_resumed_exactly_with_dropout(trained, tmp_path):
    family, argv, output, _, _ = trained
    torn = tmp_path / family
    shutil.copytree(output, torn)
    shutil.rmtree(torn / "checkpoint-4")
    for name in ("train_summary.json", "adapter_model.safetensors", "non_lora_trainables.safetensors"):
        (torn / name).unlink()
    at = argv.index("--output_dir") + 1
    _, printed = run([*argv[:at], str(torn), *argv[at + 1 :]])
    assert "going on from" in printed
    for folder in (torn, output):
        assert len(read_metrics(folder / "metrics.jsonl")) == 4
    assert [r["loss"] for r in read_metrics(torn / "metrics.jsonl")] == [
        r["loss"] for r in read_metrics(output / "metrics.jsonl")
    ]
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        assert (torn / name).read_bytes() == (output / name).read_bytes()


def test_merging_by_hand(world, llava):
    """W + alpha / r * B A, of one layer."""
    base = load_file(world.llm / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    files = load_file(llava / "adapter_model.safetensors")
    a, b = (files[f"base_model.model.model.layers.1.mlp.up_proj.lora_{k}.weight"] for k in "AB")
    assert (tuple(a.shape), tuple(b.shape)) == ((4, 32), (64, 4))
    _, merged, _, _ = load_pretrained_model(str(llava), str(world.llm), device="cpu")
    weight = merged.get_model().layers[1].mlp.up_proj.weight
    assert (weight - base).abs().max() > 1e-5
    torch.testing.assert_close(weight.detach(), base + 8 / 4 * (b @ a), atol=1e-7, rtol=0)


def test_peft_reads_it_onto_the_bare_language_model(world, llava):
    ids = torch.tensor([[3, 40, 41, 50, 60]])
    bare = LlamaForCausalLM.from_pretrained(world.llm)
    by_peft = PeftModel.from_pretrained(bare, llava)
    _, ours, _, _ = load_pretrained_model(str(llava), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, by_peft(ids).logits, atol=1e-5, rtol=0)


def test_llavas_own_folder(llava, tmp_path):
    """LLaVA writes no tokenizer and no picture settings, its lists are torch's, and its config knows no exclusions."""
    _, right, processor, _ = load_pretrained_model(str(llava), device="cpu")
    folder = tmp_path / "theirs"
    folder.mkdir()
    config = json.loads((llava / "adapter_config.json").read_text())
    del config["exclude_modules"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(load_file(llava / "adapter_model.safetensors"), folder / "adapter_model.bin")
    shutil.copy(llava / "non_lora_trainables.bin", folder)
    ours = json.loads((llava / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in ours.items() if k != "vision_config"}))
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), config["base_model_name_or_path"], device="cpu")
    assert tokenizer.pad_token is not None
    assert torch.equal(logits(model, processor), logits(right, processor))


def test_on_a_whole_llava(world, llava, tmp_path):
    """Adapters on what an earlier run left, their projector frozen: the folder finds its base by itself."""
    from llava_sv.release.merge_lora import merge_lora

    merge_lora(str(llava), None, str(tmp_path / "whole"))
    argv = world.flags("skip", tmp_path / "more", *LORA, "--freeze_mm_mlp_adapter", "True")
    argv[argv.index("--model_name_or_path") + 1] = str(tmp_path / "whole")
    model, _ = run(argv)
    trains = {part for part, (_, count) in build.count_parameters(model).items() if count}
    assert trains == {"language model adapters", "summaries"}
    _, loaded, processor, _ = load_pretrained_model(str(tmp_path / "more"), device="cpu", merge_lora=False)
    assert torch.equal(logits(loaded, processor), logits(model, processor))


def test_from_earlier_adapters(world, llava, tmp_path):
    model, _, _ = built(world.flags("skip", tmp_path, *LORA, "--lora_weight_path", str(llava)))
    names = dict(model.named_parameters())
    state = adapters.read_state(str(llava))
    assert len(state) > 20
    assert all(torch.equal(names[name], value) for name, value in state.items())
    assert all(names[name].requires_grad for name in state)


def test_an_encoder_that_trained_earlier_stays_in_the_folder(world, tmp_path):
    """Trained by the first run, frozen in the second, which starts from it: still saved, since no base has it."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(world.flags("skip", first, *LORA, "--unfreeze_mm_vision_tower", "True"))
    model, _ = run(world.flags("skip", second, *LORA, "--lora_weight_path", str(first)))
    was, now = (load_file(folder / "non_lora_trainables.safetensors") for folder in (first, second))
    assert set(was) == set(now)
    tower = [name for name in was if "vision_tower" in name]
    assert len(tower) > 10
    assert all(torch.equal(was[name], now[name]) for name in tower)
    _, loaded, processor, _ = load_pretrained_model(str(second), device="cpu", merge_lora=False)
    assert torch.equal(logits(loaded, processor), logits(model, processor))


def test_adapters_are_not_added_to_quantised_weights(llava):
    with pytest.raises(UserError, match="merge_lora: adapters cannot be added to quantised weights"):
        load_pretrained_model(str(llava), load_4bit=True, merge_lora=True)


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ([], {"projector", "summaries"}),
        (["--freeze_backbone", "True"], {"projector", "summaries"}),
        (["--freeze_mm_mlp_adapter", "True"], {"summaries"}),
        (["--freeze_backbone", "True", "--freeze_mm_mlp_adapter", "True"], {"summaries"}),
        (["--unfreeze_mm_vision_tower", "True"], {"projector", "summaries", "vision tower"}),
    ],
)
def test_what_trains_beside_the_adapters(world, tmp_path, extra, parts):
    model, _, args = built(world.flags("skip", tmp_path, *LORA, *extra, "--mm_projector_lr", "2e-5"))
    trains = {part for part, (_, count) in build.count_parameters(model).items() if count}
    assert trains == parts | {"language model adapters"}
    groups = split_parameters(model, set(), args)
    grouped = {id(p): group.get("lr") for group in groups for p in group["params"]}
    for name, value in model.named_parameters():
        assert (id(value) in grouped) is value.requires_grad, name
        assert grouped.get(id(value)) == (2e-5 if value.requires_grad and "mm_projector" in name else None), name


def test_adapters_alone_on_a_dense_model(world, tmp_path):
    model, _, _ = built(world.flags("sft", tmp_path, *LORA, "--freeze_mm_mlp_adapter", "True"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }


def test_chosen_layers(world, tmp_path):
    model, _, _ = built(world.flags("skip", tmp_path, *LORA, "--lora_target_modules", "q_proj, v_proj"))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"}


def test_layers_that_are_not_there_are_named(world, tmp_path):
    with pytest.raises(UserError, match=r"is called 'fc1'; there are: down_proj, gate_proj, k_proj, o_proj, q_proj"):
        built(world.flags("skip", tmp_path, *LORA, "--lora_target_modules", "q_proj,fc1"))


def test_adapters_depend_on_the_seed_alone(world, tmp_path):
    def first(*extra):
        model = built(world.flags("skip", tmp_path, *LORA, *extra))[0]
        return dict(model.named_parameters())["model.layers.0.self_attn.q_proj.lora_A.default.weight"]

    assert torch.equal(first(), first("--mm_projector_type", "linear"))
    assert not torch.equal(first(), first("--seed", "7"))


@pytest.mark.parametrize(("bias", "where"), [("none", ()), ("lora_only", ("q_proj",)), ("all", ("q_proj", "v_proj"))])
def test_biases(world, tmp_path, bias, where):
    """Of the language model only, never the encoder's; saved, and loaded again."""
    shutil.copytree(world.llm, tmp_path / "llm")
    config = LlamaConfig.from_pretrained(world.llm, attention_bias=True)
    biased = LlamaForCausalLM(config)
    biased.save_pretrained(tmp_path / "llm")
    argv = world.flags("skip", tmp_path / "out", *LORA, "--lora_bias", bias, "--lora_target_modules", "q_proj")
    argv[argv.index("--model_name_or_path") + 1] = str(tmp_path / "llm")
    model, _ = run(argv)
    trains = {
        name for name, p in model.named_parameters() if p.requires_grad and "bias" in name and "projector" not in name
    }
    found = {name.split(".self_attn.")[1].split(".")[0] for name in trains}
    assert all("layers." in name and "vision_tower" not in name for name in trains)
    assert found == ({"q_proj", "k_proj", "v_proj", "o_proj"} if bias == "all" else set(where))
    _, loaded, processor, _ = load_pretrained_model(str(tmp_path / "out"), device="cpu", merge_lora=False)
    assert torch.equal(logits(loaded, processor), logits(model, processor))
    _, merged, processor, _ = load_pretrained_model(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(logits(merged, processor), logits(model, processor), atol=1e-5, rtol=0)


def test_frozen_weights_are_narrow_under_mixed_precision(world, tmp_path):
    model, _ = run(world.flags("skip", tmp_path, *LORA, "--bf16", "True"))
    for name, value in model.named_parameters():
        assert value.dtype is (torch.float32 if value.requires_grad else torch.bfloat16), name
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    run(world.flags("skip", tmp_path / "wide", *LORA))
    assert losses == pytest.approx([r["loss"] for r in read_metrics(tmp_path / "wide" / "metrics.jsonl")], rel=1e-2)


def test_chat_answers_from_an_adapter_folder(world, llava, capsys):
    picture = str(next((world.data / "images").iterdir()))
    argv = ["--model-path", str(llava), "--image-file", picture, "--prompt", "What?", "--max-new-tokens", "3"]
    assert chat([*argv, "--device", "cpu"]) in (0, None)
    alone = capsys.readouterr().out
    assert chat([*argv, "--device", "cpu", "--model-base", str(world.llm)]) in (0, None)
    assert capsys.readouterr().out == alone


def test_what_is_quantised(world, tmp_path):
    """The decoder's linear layers, and nothing of encoder, projector and output layer, by transformers' own rule."""
    rule = pytest.importorskip("transformers.quantizers.quantizers_utils")
    model, _, _ = built(world.flags("skip", tmp_path))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = {name for name in linear if rule.should_convert_module(name, list(KEPT))}
    assert chosen == {name for name in linear if name.startswith("model.layers.")}
    assert len(chosen) == 14 < len(linear)


def test_float16_on_a_cpu_stays_float32(world, tmp_path):
    """There is no autocast to float16 there, which narrow frozen weights would need."""
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    flags = [*LORA, "--max_steps", "1"]
    run(world.flags("skip", wide, *flags))
    run(world.flags("skip", narrow, *flags, "--fp16", "True"))
    rows = [read_metrics(output / "metrics.jsonl")[0] for output in (narrow, wide)]
    assert rows[0]["loss"] == rows[1]["loss"]
