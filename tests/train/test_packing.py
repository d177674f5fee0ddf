"""`--packing True` through the real entry: the same losses and weights as unpacked, fewer steps, less padding."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava_sv.errors import UserError
from llava_sv.train.metrics import read_metrics
from llava_sv.train.train import main, train
from tests.train.tiny import SKIPPING, World

torch.set_num_threads(1)

ONE_STEP_AN_EPOCH = ("--per_device_train_batch_size", "16", "--num_train_epochs", "3", "--warmup_steps", "0")


def rows(output):
    return read_metrics(output / "metrics.jsonl")


@pytest.mark.parametrize("family", SKIPPING)
def test_the_same_losses_and_weights_as_without(world, tmp_path, family):
    """All 16 samples are in each step, packed or not: whatever differs, differs by rounding."""
    flags = [*SKIPPING[family], *ONE_STEP_AN_EPOCH]
    apart, packed = tmp_path / "apart", tmp_path / "packed"
    assert train(argv=world.flags("skip", apart, *flags)) == 0
    assert train(argv=world.flags("skip", packed, *flags, "--packing", "True")) == 0
    assert [row["step"] for row in rows(packed)] == [1, 2, 3]
    assert [row["loss"] for row in rows(packed)] == pytest.approx([row["loss"] for row in rows(apart)], rel=1e-5)
    expected, found = (load_file(output / "model.safetensors") for output in (apart, packed))
    for name, value in expected.items():
        # Adam divides small gradients by their own size: rounding of 1e-7 in a gradient of 1e-5 moves 1e-2 of a step
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_fewer_steps_and_less_padding(tmp_path, capsys):
    world = World(tmp_path / "world", count=128)
    apart, packed = tmp_path / "apart", tmp_path / "packed"
    flags = ["--per_device_train_batch_size", "4"]
    assert train(argv=world.flags("skip", apart, *flags)) == 0
    assert train(argv=world.flags("skip", packed, *flags, "--packing", "True", "--group_by_modality_length", "1")) == 0
    said = re.search(r"packing: 128 samples in (\d+) packs of up to 256 tokens", capsys.readouterr().out)
    packs = int(said[1])
    summaries = [json.loads((output / "train_summary.json").read_text()) for output in (apart, packed)]
    assert [(summary["samples"], summary["steps"]) for summary in summaries] == [(128, 32), (128, math.ceil(packs / 4))]
    assert packs < 128 / 4
    seen = [sum(row["visual_tokens"] for row in rows(output)) for output in (apart, packed)]
    assert seen == [96 * 11] * 2  # 96 pictures of 4 + 5 + 2 tokens
    padding = [sum(row["padding_share"] for row in rows(x)) / len(rows(x)) for x in (apart, packed)]
    assert padding[1] < padding[0]  # the last pack, half empty, weighs much among so few


def test_going_on_takes_the_same_packs(world, tmp_path):
    flags = ["--packing", "True", "--per_device_train_batch_size", "1", "--num_train_epochs", "2"]
    flags += ["--model_max_length", "128", "--save_strategy", "steps", "--save_steps", "3"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert train(argv=world.flags("skip", whole, *flags)) == 0
    shutil.copytree(whole, torn)
    for folder in torn.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > 6:
            shutil.rmtree(folder)
    (torn / "train_summary.json").unlink()
    assert train(argv=world.flags("skip", torn, *flags)) == 0
    assert [(r["step"], r["loss"]) for r in rows(torn)] == [(r["step"], r["loss"]) for r in rows(whole)]
    assert len(rows(whole)) > 12
    assert json.loads((torn / "train_summary.json").read_text())["samples"] == 32


def test_without_images(world, tmp_path):
    """Every row full of text: encoder and projector still run, on the picture that weighs nothing."""
    records = [record for record in json.loads((world.data / "sft.json").read_text()) if "image" not in record]
    (tmp_path / "text.json").write_text(json.dumps(records))
    output = tmp_path / "output"
    data = ["--data_path", str(tmp_path / "text.json")]
    assert train(argv=world.flags("skip", output, *data, "--packing", "True")) == 0
    assert [row["visual_tokens"] for row in rows(output)] == [0]


def test_an_attention_that_mixes_samples_is_refused(world, tmp_path, monkeypatch, capsys):
    from llava_sv.train import build

    def mixes(name, device):
        raise UserError(f"--packing True: attention {name!r} lets packed samples see each other here")

    monkeypatch.setattr(build, "check_keeps_apart", mixes)
    assert main(world.flags("skip", tmp_path, "--packing", "True")) == 2
    assert "attention 'sdpa_varlen' lets packed samples" in capsys.readouterr().err


def test_flex_attention_is_refused_on_a_cpu(world, tmp_path, capsys):
    flags = world.flags("skip", tmp_path, "--packing", "True", "--attn_implementation", "flex_attention")
    assert main(flags) == 2
    assert "flex_attention cannot train on a CPU; choose sdpa" in capsys.readouterr().err


def test_what_stands_in_for_unreadable_pictures_takes_no_more_than_a_row(world, tmp_path, monkeypatch):
    """Short records whose picture is missing, each followed by a long one, which stands in for several of a row."""
    from llava_sv.train.llava_trainer import LLaVATrainer

    records = json.loads((world.data / "sft.json").read_text())
    for i, record in enumerate(records):
        if i % 2 == 0:
            record |= {"image": "gone.png", "conversations": record["conversations"][:2]}
        else:
            more = [{**turn, "value": turn["value"].replace("<image>\n", "")} for turn in record["conversations"]]
            record["conversations"] = record["conversations"] + more + more
    (tmp_path / "data.json").write_text(json.dumps(records))
    lengths = []
    step = LLaVATrainer.training_step

    def noting(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        lengths.extend(sum(row) for row in self.model.last_sample_lengths)
        return loss

    monkeypatch.setattr(LLaVATrainer, "training_step", noting)
    flags = ["--packing", "True", "--missing_images", "skip", "--model_max_length", "150"]
    output = tmp_path / "output"
    assert train(argv=world.flags("skip", output, "--data_path", str(tmp_path / "data.json"), *flags)) == 0
    assert json.loads((output / "train_summary.json").read_text())["image_problems"]["missing"] > 0
    assert 0 < max(lengths) <= 150


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (("True", "120"), ("False", "120"), "--packing True, now False"),
        (("True", "120"), ("True", "200"), "--model_max_length 120, now 200"),
    ],
)
def test_going_on_with_other_packs_is_refused(world, tmp_path, capsys, was, now, said):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"]

    def argv(packing, longest):
        return world.flags("skip", tmp_path, *flags, "--packing", packing, "--model_max_length", longest)

    assert train(argv=argv(*was)) == 0
    (tmp_path / "train_summary.json").unlink()
    assert main(argv(*now)) == 2
    assert said in capsys.readouterr().err
