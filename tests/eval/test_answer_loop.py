"""The answer loop: batches against single questions, resuming, asking blind; and the command around it."""

from __future__ import annotations

import json

import pytest

from llava_sv import cli
from llava_sv.eval import answer_loop
from llava_sv.eval.answer_loop import AnswerSettings, answer_questions, fingerprint
from llava_sv.eval.tasks import TASKS

TASK = TASKS["toy"]


def ask(assistant, questions, path, **settings):
    chosen = AnswerSettings(max_new_tokens=6, **settings)
    return answer_questions(assistant, TASK, questions, path, chosen, fingerprint("model", "toy", chosen))[0]


def test_a_batch_answers_what_each_question_alone_gets(skip_assistant, bench, tmp_path):
    questions = TASK.load(bench)
    single = ask(skip_assistant, questions, tmp_path / "1.jsonl", batch_size=1)
    batched = ask(skip_assistant, questions, tmp_path / "5.jsonl", batch_size=5)
    assert single == batched
    assert len(set(single.values())) > 1


def test_the_image_changes_answers_and_blind_takes_it_away(skip_assistant, bench, tmp_path, monkeypatch):
    seen = []
    real = answer_loop.make_batch

    def spy(assistant, conversations, images, **kwargs):
        batch = real(assistant, conversations, images, **kwargs)
        seen.append(((batch.input_ids == -200).sum().item(), batch.images))
        return batch

    monkeypatch.setattr(answer_loop, "make_batch", spy)
    questions = TASK.load(bench)[:4]
    sighted = ask(skip_assistant, questions, tmp_path / "a.jsonl", batch_size=4)
    blind = ask(skip_assistant, questions, tmp_path / "b.jsonl", batch_size=4, blind=True)
    assert seen[0][0] == 4
    assert len(seen[0][1]) == 4
    assert seen[1] == (0, None)
    assert sighted != blind


def test_a_stopped_loop_goes_on_where_the_file_ends(skip_assistant, bench, tmp_path, monkeypatch):
    questions = TASK.load(bench)
    whole_path, path = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    whole = ask(skip_assistant, questions, whole_path, batch_size=3)
    ask(skip_assistant, questions, path, batch_size=3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:20])

    asked = []
    real = answer_loop.answer_batch
    monkeypatch.setattr(
        answer_loop, "answer_batch", lambda a, t, batch, *rest: asked.extend(batch) or real(a, t, batch, *rest)
    )
    assert ask(skip_assistant, questions, path, batch_size=3) == whole
    assert [q.id for q in asked] == [q.id for q in questions[7:]]
    assert path.read_bytes() == whole_path.read_bytes()


def test_other_settings_start_anew(skip_assistant, bench, tmp_path, monkeypatch):
    questions = TASK.load(bench)[:3]
    path = tmp_path / "a.jsonl"
    ask(skip_assistant, questions, path)
    ask(skip_assistant, questions, path, skip_kv="none")
    assert len(path.read_text().splitlines()) == 3
    monkeypatch.setattr(answer_loop, "answer_batch", None)
    ask(skip_assistant, questions, path, skip_kv="none")


def test_new_weights_in_the_same_folder_are_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint(str(tmp_path), "toy", AnswerSettings())
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert fingerprint(str(tmp_path), "toy", AnswerSettings()) != before


def test_command_writes_score_and_answers_that_agree(skip_checkpoint, bench, tmp_path, capsys):
    out = tmp_path / "result.json"
    argv = [
        "eval",
        "--model-path",
        str(skip_checkpoint),
        "--task",
        "toy",
        "--data-path",
        str(bench),
        "--json",
        str(out),
    ]
    assert (
        cli.main([*argv, "--batch-size", "4", "--max-new-tokens", "4", "--timing", "1", "--timing-repeats", "1"]) == 0
    )
    result = json.loads(out.read_text())
    rows = [json.loads(line) for line in (tmp_path / "result.answers.jsonl").read_text().splitlines()]
    assert result["questions"] == len(rows) == 12
    assert result["accuracy"] == sum(row["correct"] for row in rows) / 12
    assert result["blind"] is False
    assert result["timing"]["samples"] == 1
    assert "existence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--task", "mme"], "error: --task: unknown benchmark 'mme'; known: toy"),
        (["--data-path", "nowhere"], "error: no such file: nowhere/bench.jsonl; draw the toy data"),
        (["--model-path", "nowhere"], "error: no such checkpoint folder: nowhere; train one"),
        (["--batch-size", "0"], "error: --batch-size must be 1 or more, got 0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(skip_checkpoint, bench, change, message, capsys):
    argv = ["eval", "--model-path", str(skip_checkpoint), "--task", "toy", "--data-path", str(bench)]
    assert cli.main([*argv, *change]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_missing_images_are_named_before_the_model_loads(skip_checkpoint, tmp_path, capsys):
    row = {"id": "a", "image": "gone.png", "category": "count", "question": "?", "answer": "2", "choices": ["2", "3"]}
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["eval", "--model-path", "nowhere", "--task", "toy", "--data-path", str(tmp_path)]
    assert cli.main(argv) == 2
    assert f"no such image file: {tmp_path / 'images' / 'gone.png'}" in capsys.readouterr().err
