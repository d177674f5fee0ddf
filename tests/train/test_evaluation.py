"""Evaluation while training: exact losses, a benchmark asked as `llava-sv eval` asks it, and an unchanged run."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava_sv import cli
from llava_sv.data import toy
from llava_sv.data.split import check_split, hold_out
from llava_sv.errors import Stopped, UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train import best, checkpoint, evaluation, stopping
from llava_sv.train.flags import parse
from llava_sv.train.llava_trainer import LLaVATrainer
from llava_sv.train.metrics import read_evaluations, read_metrics, read_rows
from llava_sv.train.train import main, train

torch.set_num_threads(1)

LOAD_BEST = ("--save_strategy", "steps", "--load_best_model_at_end", "True")
STEPS = ("--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2")


def run(argv):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert train(argv=argv) == 0
    return out.getvalue()


def losses(output):
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


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


# -- the best checkpoint --------------------------------------------------------------------------------------------


def history(*values):
    return [{"step": 2 * i, "eval_loss": value} for i, value in enumerate(values, 1)]


def test_patience_counts_evaluations_without_a_better_one():
    patience = best.Patience(2, "loss", greater=False)
    assert [patience.waited(history(3, 2, 2.5, 2, 1.9)[:n]) for n in range(1, 6)] == [0, 0, 1, 2, 0]
    assert best.Patience(2, "eval_loss", greater=True).waited(history(3, 2, 4, 4)) == 1
    assert patience.waited(history(3, float("nan"), 2)) == 0, "what is no number is no evaluation"
    twice = [*history(3, 2), {"step": 4, "eval_loss": 2}]
    assert patience.waited(twice) == 0, "an evaluation made again after a resumption counts once"


def test_the_best_checkpoint_is_kept_named_exported_and_loaded(world, tmp_path, monkeypatch):
    """Validation losses as given: the second of four is best, and would be rotated away."""
    given = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", *STEPS, "--save_total_limit", "2", "--load_best_model_at_end", "True"]
    printed = run(world.flags("skip", tmp_path, *flags, "--export_best", "copy", "--max_steps", "8"))
    assert [folder.name for _, folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
    wanted = {"best_checkpoint": "checkpoint-4", "best_metric": 1.0, "best_step": 4, "best_metric_name": "eval_loss"}
    assert wanted.items() <= summary_of(tmp_path).items()
    assert "best checkpoint: " in printed
    state = [
        load_file(tmp_path / folder / "model.safetensors") for folder in (".", "checkpoint-4", "best", "checkpoint-8")
    ]
    assert all(torch.equal(state[0][name], other[name]) for other in state[1:3] for name in state[0])
    assert any(not torch.equal(state[0][name], state[3][name]) for name in state[0])
    assert not list((tmp_path / "best").glob("optimizer*"))
    load_pretrained_model(str(tmp_path / "best"), device="cpu")


def test_a_projectors_best_checkpoint_is_loaded_too(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", *STEPS, "--load_best_model_at_end", "True", "--max_steps", "4"]
    run(world.flags("pretrain", tmp_path, *flags, "--export_best", "link"))
    final, first, last = (
        load_file(tmp_path / folder / "mm_projector.safetensors") for folder in (".", "best", "checkpoint-4")
    )
    assert (tmp_path / "best").resolve().name == "checkpoint-2"
    assert all(torch.equal(final[name], first[name]) for name in final)
    assert any(not torch.equal(final[name], last[name]) for name in final)


def test_adapters_that_were_best_are_loaded_too(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", *STEPS, "--load_best_model_at_end", "True", "--max_steps", "4"]
    run(world.flags("skip", tmp_path, *flags, "--lora_enable", "True", "--lora_r", "2", "--packing", "True"))
    for name in ("adapter_model", "non_lora_trainables"):
        final, first, last = (
            load_file(tmp_path / folder / f"{name}.safetensors") for folder in (".", "checkpoint-2", "checkpoint-4")
        )
        assert all(torch.equal(final[key], first[key]) for key in final)
        assert any(not torch.equal(final[key], last[key]) for key in final)


def test_early_stopping_stops_and_saves(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", "--eval_steps", "1", "--early_stopping_patience", "2"]
    printed = run(world.flags("skip", tmp_path, *flags))
    assert "stopping at step 3: 2 evaluations in a row without a better eval_loss" in printed
    found = summary_of(tmp_path)
    assert (found["steps"], found["best_checkpoint"], found["best_metric"]) == (3, None, 1.0)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_step_that_may_save_the_best_also_logs(world, tmp_path):
    flags = ["--validation_split", "2", "--eval_steps", "2", "--save_strategy", "best", "--logging_steps", "100"]
    run(world.flags("skip", tmp_path, *flags, "--max_steps", "4"))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4]
    assert summary_of(tmp_path)["best_checkpoint"] is not None


def asked_to_stop_at(step, monkeypatch):
    """SIGTERM during `step` of this process's run."""
    real = LLaVATrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            stopping.SIGNALS.received = "SIGTERM"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LLaVATrainer, "training_step", training_step)


def test_a_preempted_run_saves_whether_it_is_the_best_or_not(world, tmp_path, monkeypatch):
    given = iter([1.0, 2.0])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: {"loss": next(given), "tokens": 1})
    flags = ["--validation_split", "1", "--eval_steps", "2", "--save_strategy", "best", "--max_steps", "8"]
    with monkeypatch.context() as patch:
        asked_to_stop_at(4, patch)
        with pytest.raises(Stopped, match=r"saved .*checkpoint-4") as stopped:
            train(argv=world.flags("skip", tmp_path, *flags))
    assert stopped.value.code == 75
    assert checkpoint.last_complete_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / checkpoint.SUMMARY).exists()


def test_an_epochs_evaluation_is_made_up_for(world, tmp_path, monkeypatch):
    """Stopped after the last step of an epoch, which is saved and left before the epoch's evaluation."""
    flags = ["--validation_split", "4", "--eval_strategy", "epoch", "--num_train_epochs", "2"]
    run(world.flags("skip", tmp_path / "whole", *flags))
    with monkeypatch.context() as patch:
        asked_to_stop_at(6, patch)
        with pytest.raises(Stopped, match=r"saved .*checkpoint-6"):
            train(argv=world.flags("skip", tmp_path / "torn", *flags))
    run(world.flags("skip", tmp_path / "torn", *flags))
    rows, whole = (
        [(row["step"], row.get("loss"), row.get("eval_loss")) for row in read_rows(tmp_path / name / "metrics.jsonl")]
        for name in ("torn", "whole")
    )
    assert [step for step, _, value in whole if value is not None] == [6, 12]
    assert rows == whole


def test_rotation_keeps_the_best_within_the_limit(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        checkpoint.mark_complete(tmp_path / f"checkpoint-{step}", step, 1)
    first, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-8"
    checkpoint.rotate(tmp_path, 3, keep=last, best=first)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 6, 8]
    checkpoint.rotate(tmp_path, 1, keep=last, best=first)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 8]
    checkpoint.rotate(tmp_path, 1, keep=last, best=last)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [8]


# -- when, and what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "strategy", "steps"),
    [
        ([], "no", None),
        (["--validation_split", "1"], "epoch", None),
        (["--validation_split", "1", "--eval_steps", "5"], "steps", 5),
        (["--validation_split", "1", *LOAD_BEST, "--save_steps", "7"], "steps", 7),
        (["--validation_split", "1", "--eval_strategy", "steps", "--eval_steps", "3"], "steps", 3),
    ],
)  # fmt: skip
def test_when_it_evaluates(world, flags, strategy, steps):
    _, _, args = parse(world.flags("sft", world.folder / "unused", *flags))
    assert (args.eval_strategy, args.eval_steps) == (strategy, steps)


MISTAKES: list = [
    (["--eval_data_path", "no/such.json"], "validation data (--eval_data_path): no file no/such.json"),
    (["--eval_benchmark", "no/such"], "--eval_benchmark no/such: neither a benchmark (toy) nor a folder or file"),
    (["--eval_benchmark", "mme=/tmp"], "unknown benchmark 'mme'; known: toy"),
    (["--validation_split", "16"], "that is 16 of the 16 records in"),
    (["--validation_split", "-0.1"], "--validation_split: expected a share of the records below 1"),
    (["--validation_split", "2", "--eval_data_path", "{sft}"], "both name validation data: drop one"),
    (["--early_stopping_patience", "2"], "--early_stopping_patience needs an evaluation to go by"),
    (["--early_stopping_patience", "0", "--validation_split", "2"], "--early_stopping_patience: expected 1 or more"),
    (["--export_best", "link"], "--export_best needs an evaluation to go by"),
    (["--export_best", "zip", "--validation_split", "2"], "--export_best: unknown value 'zip'; known: no, link, copy"),
    (["--export_best", "link", "--validation_split", "2"], "no checkpoints are saved with --save_strategy no"),
    (["--eval_strategy", "epoch"], "--eval_strategy epoch: there is nothing to evaluate; add --eval_data_path"),
    (["--eval_strategy", "no", "--validation_split", "2"], "--eval_strategy no: nothing would be evaluated"),
    (["--load_best_model_at_end", "True"], "--load_best_model_at_end needs an evaluation to go by"),
    (
        ["--validation_split", "2", *LOAD_BEST, "--save_steps", "3", "--eval_steps", "2"],
        "--load_best_model_at_end requires the saving steps to be a round multiple of the evaluation",
    ),
    (["--validation_split", "2", "--metric_for_best_model", "accuracy"], "not among what is evaluated: loss"),
    (["--eval_benchmark_limit", "0"], "--eval_benchmark_limit: expected 1 or more, got 0"),
]


@pytest.mark.parametrize(("flags", "said"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(world, tmp_path, capsys, flags, said):
    flags = [flag.format(sft=world.data / "sft.json") for flag in flags]
    assert main(world.flags("sft", tmp_path, *flags)) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty; expected LLaVA records"),
        ("[]", "holds no records"),
        ('[{"id": 1}', "line 1"),
        ('[{"id": "a", "conversations": [{"from": "human", "value": "<image>"}]}]', "no question with an answer"),
        (
            '[{"id": "a", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>"}, '
            '{"from": "gpt", "value": "x"}]}]',
            "evaluation: record 'a': no such image file",
        ),
    ],
)  # fmt: skip
def test_a_broken_validation_file_is_one_line(world, tmp_path, capsys, content, said):
    path = tmp_path / "eval.json"
    path.write_text(content)
    assert main(world.flags("sft", tmp_path / "out", "--eval_data_path", str(path))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not read_rows(tmp_path / "out" / "metrics.jsonl")


def test_a_benchmark_without_its_images_is_one_line(world, bench, tmp_path, capsys):
    shutil.copy(bench / "bench.jsonl", tmp_path / "bench.jsonl")
    assert main(world.flags("sft", tmp_path / "out", "--eval_benchmark", str(tmp_path / "bench.jsonl"))) == 2
    assert "no such image file: " in capsys.readouterr().err.strip().splitlines()[-1]


def test_fsdp_cannot_generate():
    with pytest.raises(UserError, match="--eval_benchmark does not work with --fsdp"):
        evaluation.check(SimpleNamespace(eval_benchmark="toy", fsdp=["full_shard"]))


# -- several processes ----------------------------------------------------------------------------------------------


def launch(flags, processes):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *launcher, "llava_sv/train/train_mem.py", *flags],
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


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
    done = launch(world.flags("skip", two, *flags, *(["--deepspeed", f"scripts/{zero}.json"] if zero else [])), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, both = (read_evaluations(output / "metrics.jsonl") for output in (one, two))
    assert len(alone) == len(both) == 2
    for a, b in zip(alone, both):
        assert b["eval_tokens"] == a["eval_tokens"]
        assert b["eval_loss"] == pytest.approx(a["eval_loss"], rel=1e-4)
        assert b["eval_accuracy"] == a["eval_accuracy"]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    rows = read_metrics(two / "metrics.jsonl")
    assert all(row["data_wait_share_mean"] <= row["data_wait_share"] for row in rows)
