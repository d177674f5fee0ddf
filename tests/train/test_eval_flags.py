"""The flags of evaluation: when it happens, and the line that each mistake ends with."""

from types import SimpleNamespace

import pytest

from llava_sv.errors import UserError
from llava_sv.train import evaluation
from llava_sv.train.flags import parse
from llava_sv.train.metrics import read_rows
from llava_sv.train.train import main

LOAD_BEST = ("--save_strategy", "steps", "--load_best_model_at_end", "True")


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


def test_fsdp_cannot_generate():
    with pytest.raises(UserError, match="--eval_benchmark does not work with --fsdp"):
        evaluation.check(SimpleNamespace(eval_benchmark="toy", fsdp=["full_shard"]))
