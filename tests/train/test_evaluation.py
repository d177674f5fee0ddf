"""Evaluation while training: exact losses, a benchmark asked as `llava-sv eval` asks it, and an unchanged run."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_sv import cli
from llava_sv.data import toy
from llava_sv.data.split import check_split, hold_out
from llava_sv.errors import UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train import checkpoint, evaluation
from llava_sv.train.flags import parse
from llava_sv.train.metrics import read_evaluations, read_metrics, read_rows
from llava_sv.train.train import main
from tests.train.runs import TWO, losses, run
from tests.train.runs import train as train_apart

torch.set_num_threads(1)

STEPS = ("--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")


def summary_of(output):
    return json.loads((output / "train_summary.json").read_text())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    assert toy.main(["--output", str(folder), "--train", "2", "--bench", "9", "--fine-bench", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """A run that evaluates nothing."""
    output = tmp_path_factory.mktemp("plain")
    run(world.flags("skip", output))
    return output


@pytest.fixture(scope="module")
def watched(world, bench, tmp_path_factory):
    """The same run, evaluated on other records and a benchmark, and what it printed."""
    output = tmp_path_factory.mktemp("watched")
    flags = ["--eval_data_path", str(world.data / "pretrain.json"), "--eval_benchmark", str(bench), *STEPS]
    return output, run(world.flags("skip", output, *flags))


# -- the run itself is not changed ----------------------------------------------------------------------------------


def test_losses_with_evaluation_are_bit_identical_to_those_without(plain, watched):
    output, _ = watched
    assert losses(output) == losses(plain)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_random_states_and_modes_are_left_as_they_were():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout())).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    wanted = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with evaluation.undisturbed(model):
        model.eval()
        random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted
    assert [module.training for module in model.modules()] == modes


def test_dropout_stays_dropout_and_accumulation_stays_whole(world, tmp_path):
    """Randomness in every forward, accumulated steps and workers: still the same losses."""
    llm = tmp_path / "llm"
    shutil.copytree(world.llm, llm)
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    flags = ["--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1", "--model_name_or_path", str(llm)]
    one, two = tmp_path / "one", tmp_path / "two"
    run(world.flags("skip", one, *flags))
    run(world.flags("skip", two, *flags, "--eval_data_path", str(world.data / "pretrain.json"), "--eval_steps", "1"))
    assert losses(two) == losses(one)
    plain = tmp_path / "plain"
    run(world.flags("skip", plain, *flags[:-2]))
    assert losses(plain) != losses(one), "dropout was at work"
    assert len(read_evaluations(two / "metrics.jsonl")) == 4


# -- the loss -------------------------------------------------------------------------------------------------------


def mean_over_tokens(model_path, world, flags, records):
    """The oracle: each record alone, its logits against its labels, in float64."""
    model_args, data_args, _ = parse(flags)
    tokenizer, model, processor, _ = load_pretrained_model(str(model_path), device="cpu")
    from llava_sv.train.build import build_dataset

    data_args.data_path = str(records)
    dataset = build_dataset(tokenizer, processor, data_args, model_args.version, model.config)
    total, count = 0.0, 0
    for sample in (dataset[i] for i in range(len(dataset))):
        batch = model.eval().prepare_inputs_labels_for_multimodal(
            sample["input_ids"][None], None, sample["labels"][None], sample["images"], sample["image_sizes"]
        )
        with torch.no_grad():
            logits = model(
                inputs_embeds=batch.inputs_embeds,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                token_roles=batch.token_roles,
            ).logits
        targets = batch.labels[0, 1:]
        kept = targets != -100
        chosen = logits[0, :-1].double().log_softmax(-1)[kept].gather(1, targets[kept][:, None])
        total, count = total - chosen.sum().item(), count + int(kept.sum())
    return total / count, count


@pytest.mark.parametrize("stage", ["sft", "skip"])
@pytest.mark.parametrize("batch", ["1", "5"])
def test_eval_loss_is_the_mean_over_supervised_tokens(world, tmp_path, stage, batch):
    records = world.data / "sft.json"  # some without an image, some cut
    flags = world.flags(
        stage, tmp_path, "--eval_data_path", str(records), "--max_steps", "2", "--eval_steps", "2",
        "--per_device_eval_batch_size", batch, "--data_path", str(world.data / "pretrain.json"),
    )  # fmt: skip
    run(flags)
    (row,) = read_evaluations(tmp_path / "metrics.jsonl")
    loss, tokens = mean_over_tokens(tmp_path, world, flags, records)
    assert row["eval_tokens"] == tokens
    assert row["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_samples_cut_to_the_longest_length_count_what_is_left(world, tmp_path):
    flags = world.flags(
        "skip", tmp_path, "--eval_data_path", str(world.data / "sft.json"), "--max_steps", "1", "--eval_steps", "1",
        "--model_max_length", "40",
    )  # fmt: skip
    run(flags)
    (row,) = read_evaluations(tmp_path / "metrics.jsonl")
    loss, tokens = mean_over_tokens(tmp_path, world, flags, world.data / "sft.json")
    assert (row["eval_tokens"], row["eval_loss"]) == (tokens, pytest.approx(loss, rel=1e-5))


def test_ranks_share_samples_out_and_count_each_once():
    samples = [{"labels": torch.tensor([i, i])} for i in range(5)]
    shards = [evaluation._Shard(samples, rank, 2) for rank in range(2)]
    assert [len(shard) for shard in shards] == [3, 3]
    labels = [shard[i]["labels"][0].item() for shard in shards for i in range(3)]
    assert labels == [0, 2, 4, 1, 3, -100]
    assert samples[0]["labels"].tolist() == [0, 0]


# -- the benchmark --------------------------------------------------------------------------------------------------


def test_the_benchmark_is_asked_as_eval_asks_it(bench, watched, tmp_path):
    output, _ = watched
    result = tmp_path / "result.json"
    folder = output / "checkpoint-8"
    argv = ["eval", "--model-path", str(folder), "--task", "toy", "--data-path", str(bench), "--json", str(result)]
    assert cli.main([*argv, "--device", "cpu"]) == 0
    wanted = json.loads(result.read_text())
    row = read_evaluations(output / "metrics.jsonl")[-1]
    assert row["eval_accuracy"] == wanted["accuracy"]
    assert {k[14:]: v for k, v in row.items() if k.startswith("eval_accuracy_")} == wanted["per_category"]


def test_answers_are_scored_over_all_questions(world, bench, tmp_path, monkeypatch):
    """A model that is always right in one category: the accuracy is that category's share."""
    questions = evaluation.open_benchmark(str(bench)).questions
    category = questions[0].category
    monkeypatch.setattr(
        evaluation, "answer_batch", lambda a, t, batch, *_: [q.answer if q.category == category else "?" for q in batch]
    )
    run(world.flags("sft", tmp_path, "--eval_benchmark", str(bench), "--max_steps", "1", "--eval_steps", "1"))
    (row,) = read_evaluations(tmp_path / "metrics.jsonl")
    share = sum(q.category == category for q in questions) / len(questions)
    assert row["eval_accuracy"] == pytest.approx(share)
    assert row[f"eval_accuracy_{category}"] == 1
    assert "eval_loss" not in row
    assert summary_of(tmp_path)["best_metric_name"] == "eval_accuracy"


def test_questions_are_shared_out_and_each_counts_once():
    for ranks in (1, 2, 3):
        shares = [list(evaluation._shares(list(range(7)), 2, rank, ranks)) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1, "as many batches on every rank"
        counted = [q for share in shares for batch, counts in share for q, c in zip(batch, counts) if c]
        assert sorted(counted) == list(range(7))


def test_a_benchmark_without_its_images_is_one_line(world, bench, tmp_path, capsys):
    shutil.copy(bench / "bench.jsonl", tmp_path / "bench.jsonl")
    assert main(world.flags("sft", tmp_path / "out", "--eval_benchmark", str(tmp_path / "bench.jsonl"))) == 2
    assert "no such image file: " in capsys.readouterr().err.strip().splitlines()[-1]


# -- what is held out -----------------------------------------------------------------------------------------------


class Numbers(list):
    path = "numbers.json"


def test_the_split_depends_on_seed_and_size_alone():
    records = Numbers(range(100))
    kept, held = hold_out(records, 0.1, seed=3)
    assert len(held) == 10
    assert sorted([*kept, *held]) == list(range(100))
    torch.rand(7)
    assert list(hold_out(records, 0.1, seed=3)[1]) == list(held)
    assert list(hold_out(records, 10.0, seed=3)[1]) == list(held)
    assert list(hold_out(records, 0.1, seed=4)[1]) != list(held)
    assert len(hold_out(records, 0.001, seed=3)[1]) == 1


@pytest.mark.parametrize("text", ["-1", "1.5", "nan", "inf", "some"])
def test_a_split_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--validation_split: expected a share of the records below 1, or their number"):
        check_split(text)


def test_held_out_records_are_never_trained_on_and_stay_the_same_after_a_resumption(world, tmp_path, monkeypatch):
    """Every record read for training and for validation, in a whole run and in one that goes on from a checkpoint."""
    seen = {"train": set(), "held": set()}
    from llava_sv.data.collator import DataCollatorForSupervisedDataset as Collator

    call, mean = Collator.__call__, evaluation.mean_loss
    evaluating = []

    def collate(self, samples):
        seen["held" if evaluating else "train"] |= {sample["id"] for sample in samples}
        return call(self, samples)

    def mean_loss(*args):
        evaluating.append(True)
        try:
            return mean(*args)
        finally:
            evaluating.pop()

    monkeypatch.setattr(Collator, "__call__", collate)
    monkeypatch.setattr(evaluation, "mean_loss", mean_loss)
    flags = world.flags("skip", tmp_path, "--validation_split", "4", "--num_train_epochs", "2", *STEPS)
    printed = run(flags)
    assert "4 of 16 records, held out by seed 42 and never trained on" in printed
    assert "12 steps; " in printed or "12 over 12 samples" in printed
    first = {name: set(ids) for name, ids in seen.items()}
    assert (len(first["train"]), len(first["held"])) == (12, 4)
    assert not first["train"] & first["held"]
    rows = read_rows(tmp_path / "metrics.jsonl")

    for step in (8, 10, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    (tmp_path / "train_summary.json").unlink()
    for ids in seen.values():
        ids.clear()
    run(flags)
    assert seen["held"] == first["held"]
    assert not seen["train"] & first["held"]
    timeless = [
        [{k: v for k, v in row.items() if k in ("step", "loss", "eval_loss", "eval_tokens")} for row in some]
        for some in (rows, read_rows(tmp_path / "metrics.jsonl"))
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--validation_split", "5"), "--validation_split 5.0"),
        (("--seed", "7"), "--seed 7"),
        (("--data_seed", "7"), "--data_seed 7"),
    ],
)
def test_another_split_does_not_go_on_from_a_checkpoint(world, tmp_path, capsys, changed, said):
    settings = {"validation_split": 4.0, "data_path": str(world.data / "sft.json"), "seed": 42, "data_seed": None}
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    checkpoint.mark_complete(folder, 4, 1, settings)
    assert main(world.flags("skip", tmp_path, "--validation_split", "4", *changed)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {said}: ")
    assert "other records would be held out" in error


# -- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_several_processes_find_what_one_finds(world, bench, tmp_path, zero):
    """An odd number of records, a rank whose batches have no image, accuracy by category: as one process has it."""
    records = json.loads((world.data / "sft.json").read_text())[:7]
    records += [record for record in records if "image" not in record] * 2
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(records))
    flags = ["--eval_data_path", str(path), "--eval_benchmark", str(bench), "--max_steps", "2", "--eval_steps", "1"]
    flags += ["--per_device_eval_batch_size", "1", "--group_by_modality_length", "True"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(world.flags("skip", one, *flags, "--per_device_train_batch_size", "4"))
    zero_flags = ["--deepspeed", f"scripts/{zero}.json"] if zero else []
    train_apart(world.flags("skip", two, *flags, *zero_flags), TWO)
    alone, both = (read_evaluations(output / "metrics.jsonl") for output in (one, two))
    assert len(alone) == len(both) == 2
    for a, b in zip(alone, both):
        assert b["eval_tokens"] == a["eval_tokens"]
        assert b["eval_loss"] == pytest.approx(a["eval_loss"], rel=1e-4)
        assert b["eval_accuracy"] == a["eval_accuracy"]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    rows = read_metrics(two / "metrics.jsonl")
    assert all(row["data_wait_share_mean"] <= row["data_wait_share"] for row in rows)
