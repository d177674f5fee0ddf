"""Training end to end on random tiny bases: what trains, at which rate, what is saved, and that it reloads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sv.errors import UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train import build
from llava_sv.train.flags import parse
from llava_sv.train.llava_trainer import EpochRandomSampler, split_parameters
from llava_sv.train.metrics import read_metrics
from llava_sv.train.train import main, total_steps
from tests.train.runs import run

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory):
    """OUTPUT of a pretraining run, and what it printed."""
    output = tmp_path_factory.mktemp("pretrain")
    return output, run(world.flags("pretrain", output, "--save_strategy", "steps", "--save_steps", "4"))


@pytest.fixture(scope="module")
def skipping(world, pretrained, tmp_path_factory):
    """OUTPUT of SFT with skipping, from that projector, and what it printed."""
    output = tmp_path_factory.mktemp("skip")
    adapter = str(pretrained[0] / "mm_projector.bin")
    return output, run(
        world.flags(
            "skip", output, "--pretrain_mm_mlp_adapter", adapter, "--group_by_modality_length", "True",
            "--mm_projector_lr", "2e-3", "--gradient_checkpointing", "True", "--save_strategy", "steps",
            "--save_steps", "4", "--report_to", "tensorboard",
        )
    )  # fmt: skip


def built(world, stage, *extra):
    """(model, arguments) as training builds them."""
    model_args, data_args, args = parse(world.flags(stage, world.folder / "unused", *extra))
    torch.manual_seed(args.seed)
    _, model, _ = build.build(model_args, data_args, args)
    build.choose_trainable(model, model_args)
    return model, model_args, args


def trained_parts(model):
    return {part for part, (_, trained) in build.count_parameters(model).items() if trained}


@pytest.mark.parametrize(
    ("stage", "extra", "parts"),
    [
        ("pretrain", [], {"projector"}),
        ("sft", [], {"projector", "language model"}),
        ("skip", [], {"projector", "language model", "summaries"}),
        ("skip", ["--freeze_backbone", "True"], {"projector", "summaries"}),
        ("skip", ["--freeze_mm_mlp_adapter", "True"], {"language model", "summaries"}),
    ],
)
def test_what_trains(world, stage, extra, parts):
    model, _, _ = built(world, stage, *extra)
    assert trained_parts(model) == parts


def test_nothing_left_to_train(world):
    with pytest.raises(UserError, match="nothing is left to train"):
        built(world, "sft", "--freeze_backbone", "True", "--freeze_mm_mlp_adapter", "True")


def test_optimizer_groups(world):
    """Each trained parameter once; the projector at its own rate; norms and biases without weight decay."""
    model, _, args = built(world, "skip", "--mm_projector_lr", "1e-4", "--weight_decay", "0.1")
    names = {id(value): name for name, value in model.named_parameters()}
    decay = {name for name in names.values() if "norm" not in name and not name.endswith("bias")}
    groups = split_parameters(model, decay, args)
    held = [names[id(value)] for group in groups for value in group["params"]]
    assert sorted(held) == sorted(name for name, value in model.named_parameters() if value.requires_grad)
    for group in groups:
        for value in group["params"]:
            name = names[id(value)]
            assert group.get("lr") == (1e-4 if "mm_projector" in name else None)
            assert group["weight_decay"] == (0.1 if name in decay else 0.0)


def test_pretraining_trains_the_projector_only(world, pretrained):
    output, printed = pretrained
    assert sorted(p.name for p in output.iterdir() if not p.name.startswith("checkpoint")) == [
        "config.json", "loss.png", "metrics.jsonl",
        "mm_projector.bin", "mm_projector.safetensors", "train_summary.json",
    ]  # fmt: skip
    saved = torch.load(output / "mm_projector.bin", weights_only=True)
    fresh, _, _ = built(world, "pretrain")
    assert set(saved) == {name for name, _ in fresh.named_parameters() if "mm_projector" in name}
    assert all(name.startswith("model.mm_projector.") for name in saved)
    moved = {name: (saved[name] - value).abs().max() for name, value in fresh.named_parameters() if name in saved}
    assert all(change > 1e-4 for change in moved.values()), moved
    assert "16 dense -> 16 in the sequence (dense)" in printed


def test_frozen_weights_stay_bit_identical(world, pretrained, skipping):
    """SFT leaves the vision tower as it was; language model, projector and summaries move."""
    output, printed = skipping
    saved = load_file(output / "model.safetensors")
    adapter = str(pretrained[0] / "mm_projector.bin")
    fresh, _, _ = built(world, "skip", "--pretrain_mm_mlp_adapter", adapter)
    same = {name: torch.equal(saved[name], value) for name, value in fresh.state_dict().items() if name in saved}
    assert {name for name, equal in same.items() if equal} == {name for name in same if "vision_tower" in name}
    assert "16 dense -> 11 in the sequence (Skip-Vision)" in printed


def test_the_saved_model_describes_itself_and_gives_the_same_loss_as_the_trained_one(world, skipping):
    output, _ = skipping
    config = json.loads((output / "config.json").read_text())
    assert (config["skip_vision"]["num_retained"], config["skip_vision"]["num_skipped"]) == (4, 5)
    assert (config["conv_template"], config["tokenizer_model_max_length"], config["use_cache"]) == (
        "llama_3",
        256,
        True,
    )
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json", "training_args.bin"):
        assert (output / name).is_file(), name

    _, final, _, context = load_pretrained_model(str(output), device="cpu")
    _, last, _, _ = load_pretrained_model(str(output / "checkpoint-8"), device="cpu")
    assert context == 256
    ids = torch.tensor([[1, 2, -200, 3, 4]])
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = final(input_ids=ids, images=images).logits
        assert torch.equal(logits, last(input_ids=ids, images=images).logits)
    assert logits.shape == (1, 4 + 11, final.config.vocab_size)
    in_memory = torch.load(output / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert len(in_memory["state"]) == sum(value.requires_grad for value in built(world, "skip")[0].parameters())


def test_metrics_of_a_run(skipping):
    output, _ = skipping
    rows = read_metrics(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert {"epoch", "loss", "learning_rate", "tokens_per_second", "samples_per_second"} <= set(row)
        assert row["visual_tokens"] in (0, 11, 22), "two samples a batch, eleven tokens an image"
        assert 0 <= row["padding_share"] < 1
        assert row["tokens_per_second"] > row["samples_per_second"] > 0
    assert sum(row["visual_tokens"] for row in rows) == 12 * 11, "twelve of the sixteen records have an image"
    assert list((output / "runs").rglob("events.out.tfevents.*")), "TensorBoard"
    summary = json.loads((output / "train_summary.json").read_text())
    assert (summary["steps"], summary["samples"]) == (8, 16)
    assert summary["train_seconds"] > 0


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    plain, saving = tmp_path / "plain", tmp_path / "saving"
    run(world.flags("skip", plain, "--max_steps", "3"))
    run(world.flags("skip", saving, "--max_steps", "3", "--gradient_checkpointing", "True"))
    losses = [[row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in (plain, saving)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bf16_without_deepspeed_keeps_weights_in_float32(world, tmp_path):
    run(world.flags("skip", tmp_path, "--max_steps", "2", "--bf16", "True"))
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_an_image_that_is_not_there_ends_in_one_line(world, tmp_path, capsys):
    """Whatever loads it: this process or a worker of the loader; with `skip`, training goes on and counts."""
    records = json.loads((world.data / "sft.json").read_text())
    records[0]["image"] = "gone.png"
    data = tmp_path / "sft.json"
    data.write_text(json.dumps(records))
    flags = world.flags("sft", tmp_path / "out", "--data_path", str(data))
    for workers in ("0", "1"):
        assert main([*flags, "--dataloader_num_workers", workers]) == 2
        assert "record 's0': no such image file" in capsys.readouterr().err
    assert "images that could not be read: 1 missing" in run([*flags, "--missing_images", "skip"])


def test_the_first_sample_is_shown_with_what_is_supervised(skipping):
    _, printed = skipping
    assert "first sample" in printed
    assert "assistant" in printed
    assert "all train" in printed


def test_a_finished_run_is_not_run_again(world, pretrained):
    output, _ = pretrained
    before = (output / "mm_projector.bin").stat().st_mtime_ns
    printed = run(world.flags("pretrain", output, "--save_strategy", "steps", "--save_steps", "4"))
    assert "is finished (8 steps): nothing to do" in printed
    assert (output / "mm_projector.bin").stat().st_mtime_ns == before


def test_training_goes_on_from_a_checkpoint_of_this_project(world, skipping, tmp_path):
    """Its skip_vision block is kept without flags, and changed by them."""
    flags = world.flags("sft", tmp_path / "more", "--max_steps", "1", "--model_name_or_path", str(skipping[0]))
    at = flags.index("--vision_tower")
    printed = run(flags[:at] + flags[at + 2 :])
    assert "-> 11 in the sequence (Skip-Vision)" in printed
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert config["skip_vision"]["num_retained"] == 4
    model_args, data_args, args = parse([*flags, "--sv_num_retained", "6"])
    model = build.build(model_args, data_args, args)[1]
    assert (model.config.skip_vision.num_retained, model.config.skip_vision.num_skipped) == (6, 5)


@pytest.mark.parametrize(
    ("stage", "extra", "said"),
    [
        ("sft", ["--version", "llama_9"], "unknown conversation template 'llama_9'; known: plain"),
        ("sft", ["--mm_family", "lava"], "unknown family 'lava'; known: llava"),
        ("sft", ["--mm_projector_type", "mlp0"], "unknown projector 'mlp0'; known: linear, identity"),
        ("skip", ["--sv_selection", "random"], "unknown selection 'random'; known: cls_similarity, cls_attention"),
        ("skip", ["--sv_num_retained", "12"], "num_retained 12 + num_skipped 5 is more than the 16 patches"),
        ("skip", ["--sv_summary_norm", "batch"], "unknown value 'batch'; known: none, layernorm"),
        ("sft", ["--attn_implementation", "flash_attention_2"], "flash-attn"),
        ("sft", ["--attn_implementation", "fast"], "unknown 'fast'; known: eager, sdpa"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(world, tmp_path, capsys, stage, extra, said):
    assert main(world.flags(stage, tmp_path, *extra)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_tied_embeddings_resume(world, tmp_path):
    """A language model whose head is its embedding saves one of the two; resuming must not call the other missing."""
    tied = tmp_path / "tied"
    shutil.copytree(world.llm, tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(tied / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, tied / "model.safetensors", {"format": "pt"})
    flags = ["--model_name_or_path", str(tied), "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    output = tmp_path / "out"
    run(world.flags("skip", output, *flags))
    losses = [row["loss"] for row in read_metrics(output / "metrics.jsonl")]
    shutil.rmtree(output / "checkpoint-4")
    (output / "train_summary.json").unlink()
    assert "checkpoint-2, step 2" in run(world.flags("skip", output, *flags))
    assert [row["loss"] for row in read_metrics(output / "metrics.jsonl")] == losses


def test_a_checkpoint_of_another_model_is_not_resumed(world, skipping, tmp_path, capsys):
    """Weights that do not fit are an error that names them, not a warning."""
    flags = world.flags("sft", tmp_path, "--resume_from_checkpoint", str(skipping[0] / "checkpoint-4"))
    assert main(flags) == 2
    assert "unexpected: ['model.mm_projector.summary.former.weight'" in capsys.readouterr().err


def test_the_random_order_depends_on_seed_and_epoch_alone():
    sampler = EpochRandomSampler(10, seed=3)
    first = list(sampler)
    torch.rand(5)
    assert list(sampler) == first
    assert sorted(first) == list(range(10))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochRandomSampler(10, seed=4)) != first


def test_steps_are_counted_as_trainer_counts_them(world, tmp_path):
    _, _, args = parse(world.flags("sft", tmp_path, "--gradient_accumulation_steps", "3"))
    assert total_steps(args, 16) == 3, "8 batches of 2, three a step"
    args.num_train_epochs = 1.5
    assert total_steps(args, 16) == 5
    args.max_steps = 4
    assert total_steps(args, 16) == 4
