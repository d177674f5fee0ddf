"""What a model card cannot be made of, in one line each: broken files by name and line, reports of others,
wrong kinds."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from llava_sv.errors import UserError
from llava_sv.release.card import make_card


def refusal(sources, **more) -> str:
    with pytest.raises(UserError) as caught:
        make_card(sources.checkpoint, sources.options(**more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


RUN = ("out/train_summary.json", "out/config.json", "pre/train_summary.json", "mixtures/squares/manifest.json")


@pytest.mark.parametrize("name", [*RUN, "skip.json", "dense.json", "timing.json"])
def test_broken_json_names_file_and_line(copy, name):
    path = copy.root / name
    path.write_text('{\n"task": "toy",\n oops}')
    said = refusal(copy)
    assert said.startswith(f"{path}, line 3, column 2: not JSON")


@pytest.mark.parametrize(("line", "what"), [('{"step": 2,', "column"), ('{"loss": 1}', "has no step"),
                                            ('{"step": 2, "loss": "low"}', "loss is 'low', not a number")])  # fmt: skip
def test_broken_metrics_name_the_line(copy, line, what):
    path = copy.checkpoint / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_text("\n".join(lines))
    said = refusal(copy)
    assert said.startswith(f"{path}, line 2")
    assert what in said


def test_wrong_values_are_named(copy):
    values = json.loads((copy.checkpoint / "train_summary.json").read_text())
    (copy.checkpoint / "train_summary.json").write_text(json.dumps({**values, "train_seconds": "long"}))
    assert "train_summary.json: train_seconds is 'long', not a number" in refusal(copy)


def test_a_share_above_one_is_no_share(copy):
    values = json.loads(copy.skip.read_text())
    copy.skip.write_text(json.dumps({**values, "accuracy": 91.4}))
    assert "accuracy is 91.4, not a share between 0 and 1" in refusal(copy)


def test_a_report_of_other_weights_is_refused(made, copy):
    path = copy.checkpoint / "model.safetensors"
    values = load_file(path)
    values["lm_head.weight"] += 0.5
    save_file(values, path, metadata={"format": "pt"})
    said = refusal(copy)
    assert said.startswith(f"{copy.skip}: is a report of another checkpoint than {copy.checkpoint}: other weights")
    assert refusal(copy, eval_reports=[]).startswith(f"{copy.timing}: is a report of another checkpoint")


def test_a_report_of_another_budget_is_refused(copy):
    path = copy.checkpoint / "config.json"
    values = json.loads(path.read_text())
    values["skip_vision"]["num_skipped"] = 6
    path.write_text(json.dumps(values))
    assert "other settings in config.json" in refusal(copy)


def test_the_control_as_the_models_own_report_is_refused(made):
    assert "is a report of another checkpoint" in refusal(made, eval_reports=[made.dense])
    assert "is of this checkpoint itself" in refusal(made, dense_reports=[made.skip])


def test_a_report_without_fingerprint_is_known_by_name(copy):
    values = json.loads(copy.skip.read_text())
    del values["checkpoint"]
    copy.skip.write_text(json.dumps(values))
    card = make_card(copy.checkpoint, copy.options())
    assert "by the folder's name only" in card.text
    copy.skip.write_text(json.dumps({**values, "model_path": "checkpoints/another"}))
    assert "is a report of checkpoints/another, without a fingerprint" in refusal(copy)


def test_a_control_asked_other_questions_is_refused(copy):
    values = json.loads(copy.dense.read_text())
    copy.dense.write_text(json.dumps({**values, "questions_sha256": "0" * 64}))
    assert f"{copy.dense}: was asked other questions than {copy.skip}" in refusal(copy)


def test_two_reports_of_the_same_are_refused(made):
    assert "give one of the two" in refusal(made, eval_reports=[made.skip, made.skip])


def test_another_manifest_is_refused(copy):
    copy.manifest.write_text(copy.manifest.read_text() + "\n")
    assert "is not the manifest that the run was trained with" in refusal(copy)
    assert "is not a mixture's manifest" in refusal(copy, data_manifest=copy.checkpoint / "config.json")


def test_what_is_no_report_of_speed_is_refused(copy, tmp_path):
    assert "is no report of speed" in refusal(copy, speed_reports=[copy.skip])
    flops = tmp_path / "flops.json"
    flops.write_text('{"paper_ratio": 0.3}')
    assert "measures nothing; leave it out" in refusal(copy, speed_reports=[flops])
    values = json.loads(copy.infer.read_text())
    copy.infer.write_text(json.dumps({**values, "family": "cos"}))
    assert "was measured on family cos, this checkpoint is llava" in refusal(copy)
    assert "no field task" in refusal(copy, eval_reports=[copy.train])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("licence: mit\nfoo: 1", "unknown key licence, foo; known: license, "),
        ("license: [mit]", "license is ['mit'], not a text"),
        ("authors: {a: b}", "authors is not a list of texts"),
        ("base_licenses: mit", "base_licenses is not a mapping"),
        ("- a", "is not a mapping"),
        ("license: mit\nlicense: apache-2.0", "line 2"),
        ("license: [", "line 1"),
    ],
)
def test_a_card_file_is_read_strictly(copy, text, said):
    path = copy.root / "card.yaml"
    path.write_text(text)
    found = refusal(copy)
    assert str(path) in found
    assert said in found


def test_paths_that_are_not_there(copy, tmp_path):
    assert "no such file" in refusal(copy, eval_reports=[tmp_path / "gone.json"])
    assert "no such file" in refusal(copy, card_file=tmp_path / "gone.yaml")
    assert "has no train_summary.json" in refusal(copy, pretrain_run=tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        make_card(tmp_path / "gone", copy.options())
    (copy.checkpoint / "model.safetensors").unlink()
    assert "has no weights" in refusal(copy)


def test_a_torn_file_of_weights_is_named(copy):
    path = copy.checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert f"weights {path}: cannot be read" in refusal(copy)


def test_names(made):
    assert "is empty or more than a line" in refusal(made, name="a\nb")
