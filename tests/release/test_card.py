"""The model card: every number comes from a file, and follows it; what no file says is not there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from safetensors import safe_open

from llava_sv import cli
from llava_sv.files import sha256_of
from llava_sv.release.card import CardOptions, make_card
from llava_sv.release.card_eval import wilson
from llava_sv.release.card_format import NOT_RECORDED
from llava_sv.train.checkpoint import mark_complete
from tests.release.card_runs import HUB, change, row, section


@pytest.fixture(scope="module")
def card(made):
    return make_card(made.checkpoint, made.options())


# -- what the card says ---------------------------------------------------------------------------------------------


def test_it_says_what_the_files_say(made, card):
    summary = json.loads((made.checkpoint / "train_summary.json").read_text())
    training = section(card.text, "Training")
    assert row(training, "Steps") == ["2", "4"]
    assert row(training, "Batch") == ["2", "2"]
    assert row(training, "Samples")[1] == str(summary["samples"])
    rows = [json.loads(line) for line in (made.checkpoint / "metrics.jsonl").read_text().splitlines()]
    losses = [one["loss"] for one in rows]
    assert row(training, "Final loss")[1] == f"{sum(losses) / 4:.4f} (mean of the last 4 logged)"
    versions = row(training, "Versions")[1]
    assert f"torch {torch.__version__}" in versions
    assert "llava_sv" in versions
    assert summary["record"]["hardware"]["cpu"] in row(training, "Hardware")[1]
    assert row(training, "Devices x hours")[1] == f"{summary['record']['device_hours']:.3f}"
    settings = section(card.text, "Settings of the run")
    assert row(settings, "`model_max_length`") == ["256"]
    assert row(settings, "`--use_cpu`") == ["yes"]


def test_parameters_are_those_of_the_headers(made, card):
    with safe_open(made.checkpoint / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    about = section(card.text, "What it is")
    assert row(about, r"**all**") == [f"**{sum(sizes.values()):,}**"]
    encoder = sum(size for name, size in sizes.items() if "vision_tower." in name)
    assert row(about, "encoder") == [f"{encoder:,}"]
    assert row(about, "summaries") == ["64"]  # two weights of width 32


def test_tokens_are_those_of_the_config(card):
    assert row(section(card.text, "Token budget"), "any") == ["16", "4", "5", "2", "11", "6", "6"]


def test_flops_agree_with_the_command(made, card, tmp_path):
    path = tmp_path / "flops.json"
    assert cli.main(["flops", "--model-path", str(made.checkpoint), "--json", str(path)]) == 0
    counted = json.loads(path.read_text())
    flops = section(card.text, "FLOPs")
    assert row(flops, "prefill, everything counted")[2] == f"{counted['exact_ratio']:.3f}"
    assert row(flops, "a training step of one sample")[2] == f"{counted['train_ratio']:.3f}"
    assert row(flops, "visual tokens in the decoder, the paper's formula")[2] == f"{counted['paper_ratio']:.3f}"


def test_an_evaluation_is_told_with_its_control(made, card):
    report, control = (json.loads(path.read_text()) for path in (made.skip, made.dense))
    told = section(card.text, "Evaluation")
    low, high = wilson(report["accuracy"], report["questions"])
    whole = [report["accuracy"], None, control["accuracy"], report["chance"]["accuracy"]]
    shares = ["-" if share is None else f"**{100 * share:.1f}%**" for share in whole]
    shares[1] = f"**{100 * low:.1f}% to {100 * high:.1f}%**"
    assert row(told, r"**all**") == [f"**{report['questions']}**", *shares]
    assert row(told, "Of this checkpoint") == ["yes, by its fingerprint"]
    assert row(told, "Skip KV-cache level") == ["skipped"]
    assert "at most 3 new tokens" in row(told, "Answers")[0]
    assert "`fine_detail`" in section(card.text, "Known weak spots and limits")


def test_wilson_is_the_textbooks():
    """Against the values that R's `prop.test(correct = FALSE)` gives."""
    assert wilson(0.9, 50) == pytest.approx((0.7864, 0.9565), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_the_data_are_told_contamination_first(made, card):
    told = section(card.text, "Training data")
    assert told.index("Contamination") < told.index("Records")
    assert row(told, "captions")[0] == "docvqa and mme"
    assert "`--exclude-contaminated` was not used" in told
    assert row(told, "Manifest's sha256") == [sha256_of(made.manifest)]
    assert row(told, "Is the manifest that the run read") == ["yes"]
    assert row(told, rf"[squares]({HUB})")[2] == "CC0"
    assert row(section(card.text, "Licences"), "data: squares") == ["CC0"]


def test_the_manifest_is_found_where_the_run_trained_on_a_mixture(made, card):
    assert make_card(made.checkpoint, made.options(data_manifest=None)).text == card.text


def test_the_same_files_give_the_same_bytes_wherever_they_lie(card, copy):
    again = make_card(copy.checkpoint, copy.options())
    assert (again.text, again.files, again.missing) == (card.text, card.files, card.missing)


def test_it_tells_of_no_place(made, card):
    assert str(made.root) not in card.text
    assert str(Path.home()) not in card.text
    assert not re.search(r"(?<![\w:/.])/(tmp|home|root|work|var|private)/", card.text)


def test_the_loss_is_drawn(card, tmp_path):
    path = tmp_path / "loss.png"
    path.write_bytes(card.files["loss.png"])
    with Image.open(path) as picture:
        assert picture.size == (840, 480)
        assert len(set(picture.convert("RGB").getdata())) > 10
    assert "(loss.png)" in card.text


# -- form -----------------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_front_matter(made, card):
    read = ModelCard(card.text)
    data: ModelCardData = read.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    assert data.datasets == ["someone/squares"]
    assert "skip-vision" in data.tags
    raw = yaml.safe_load(card.text.split("---\n")[1])
    name, results = model_index_to_eval_results(raw["model-index"])
    report = json.loads(made.skip.read_text())
    assert (name, data.model_name) == ("tiny", "tiny")
    assert results[0].metric_value == round(report["accuracy"], 6)
    assert {one.dataset_name for one in results} == {"toy"}
    assert len(results) == 1 + len(report["per_category"])
    assert data.base_model is None  # the bases are folders


def test_tables_are_well_formed(card):
    body = card.text.split("---\n", 2)[2].splitlines()
    blocks: list[list[str]] = [[]]
    for line in body:
        if line.startswith("|"):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    assert len(blocks) >= 14
    for block in blocks:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in block}
        assert len(widths) == 1, block
        assert set(block[1]) <= set("|-"), block
        assert len(block) > 2, block


def test_a_bar_in_a_name_breaks_no_table(made):
    card = make_card(made.checkpoint, made.options(base_models=("or|g/llm", "org/encoder")))
    assert row(section(card.text, "What it is"), "Made from") == [r"or\|g/llm and org/encoder"]
    assert ModelCard(card.text).data.base_model == ["org/encoder"]


# -- the card follows its files ---------------------------------------------------------------------------------------

FOLLOWED = [
    ("out/train_summary.json", ("steps",), 987_654, "Training", "987,654"),
    ("out/train_summary.json", ("train_seconds",), 7260.0, "Training", "2.0 h"),
    ("out/train_summary.json", ("skipped_steps",), 17, "Training", "17"),
    ("out/train_summary.json", ("image_problems", "missing"), 23, "Training", "23 missing"),
    ("out/train_summary.json", ("record", "device_hours"), 81.25, "Training", "81.2"),
    ("out/train_summary.json", ("record", "hardware", "cpu"), "Some CPU", "Training", "Some CPU"),
    ("out/train_summary.json", ("record", "versions", "torch"), "9.9.9", "Training", "torch 9.9.9"),
    ("out/train_summary.json", ("settings", "learning_rate"), 0.0321, "Settings of the run", "0.0321"),
    ("out/train_summary.json", ("settings", "data_content"), "77 bytes", "Training data", "77 bytes"),
    ("pre/train_summary.json", ("steps",), 456_789, "Training", "456,789"),
    ("out/config.json", ("skip_vision", "num_skipped"), 6, "Token budget", "| any | 16 | 4 | 6 |"),
    (
        "out/config.json",
        ("intermediate_size",),
        6400,
        "FLOPs",
        "visual tokens in the decoder, the paper's formula | 20 M",
    ),
    ("out/config.json", ("conv_template",), "v1", "What it is", "| Conversation template | v1 |"),
    ("skip.json", ("accuracy",), 0.7654, "Evaluation", "**76.5%**"),
    ("skip.json", ("per_category", "text"), 0.4321, "Evaluation", "43.2%"),
    ("skip.json", ("per_category", "fine_detail"), 0.4321, "Known weak spots and limits", "43.2%"),
    ("skip.json", ("generation", "skip_kv"), "none", "Evaluation", "| Skip KV-cache level | none |"),
    ("skip.json", ("generation", "do_sample"), True, "Evaluation", "| Answers | sampled, "),
    ("dense.json", ("generation", "max_new_tokens"), 77, "Evaluation", "otherwise than this one: max_new_tokens 77"),
    ("pre/train_summary.json", ("settings", "learning_rate"), 0.0654, "Training", "| Learning rate | 0.0654 | "),
    ("pre/train_summary.json", ("settings", "data_path"), "some/p.json", "Training", "| Data | `some/p.json` | "),
    ("out/train_summary.json", ("samples",), 363, "Training", "; over the whole run "),
    ("dense.json", ("accuracy",), 0.6543, "Evaluation", "**65.4%**"),
    ("timing.json", ("skip", "time_to_first_token_ms"), 12345.6, "Measured speed", "12,345.60 ms"),
    ("timing.json", ("dense", "kv_bytes"), 7 * 2**30, "Measured speed", "7.0 GiB"),
    ("infer.json", ("skip", "decode_ms_per_token"), 4321.0, "Measured speed", "4,321.00 ms"),
    ("infer.json", ("regions", "prefill", "time_saved"), 0.777, "Measured speed", "77.7%"),
    ("train.json", ("regions", "llm", "skip", "step_ms"), 2468.0, "Measured speed", "2,468.00 ms"),
    ("train.json", ("environment", "device"), "Other GPU", "Measured speed", "device Other GPU"),
]


@pytest.mark.parametrize(("name", "keys", "value", "title", "shown"), FOLLOWED)
def test_a_changed_file_changes_the_card(card, copy, name, keys, value, title, shown):
    change(copy.root / name, *keys, value=value)
    # another budget is another model, which the reports are not of
    options = copy.options(eval_reports=[], speed_reports=[]) if name == "out/config.json" else copy.options()
    changed = make_card(copy.checkpoint, options)
    assert shown in section(changed.text, title)
    assert section(changed.text, title) != section(card.text, title)


def test_changed_metrics_change_loss_and_picture(card, copy):
    path = copy.checkpoint / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["loss"] = 123.0
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    changed = make_card(copy.checkpoint, copy.options())
    losses = [one["loss"] for one in rows]
    assert row(section(changed.text, "Training"), "Final loss")[1].startswith(f"{sum(losses) / 4:.4f} ")
    assert changed.files["loss.png"] != card.files["loss.png"]


def test_a_changed_manifest_changes_the_card(copy):
    summary = copy.checkpoint / "train_summary.json"
    change(copy.manifest, "sources", 0, "licence", value="CC BY 9.0")
    change(copy.manifest, "sources", 0, "taken", value=7654)
    change(summary, "record", "data", "manifest_sha256", value=sha256_of(copy.manifest))
    told = section(make_card(copy.checkpoint, copy.options()).text, "Training data")
    assert row(told, rf"[squares]({HUB})") == ["7,654", "-", "CC BY 9.0", row(told, rf"[squares]({HUB})")[3]]


def test_left_out_sources_are_said(copy):
    values = json.loads(copy.manifest.read_text())
    values["left_out"] = [{"source": "captions", "home": "", "why": "contaminated", "missing": []}]
    values["sources"] = values["sources"][:1]
    copy.manifest.write_text(json.dumps(values))
    summary = copy.checkpoint / "train_summary.json"
    change(summary, "record", "data", "manifest_sha256", value=sha256_of(copy.manifest))
    told = section(make_card(copy.checkpoint, copy.options()).text, "Training data")
    assert "no source in the mixture is marked as close to a benchmark (captions left out by" in told


# -- what is not there ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_not_recorded(copy, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(copy.checkpoint / name, bare / name)
    card = make_card(bare, CardOptions())
    for what in ("steps", "hardware", "final loss", "loss curve (metrics.jsonl)", "measured speed", "data manifest",
                 "evaluation (llava-sv eval --json)", "licence of these weights (card file: license)",
                 "settings of the run (train_summary.json)"):  # fmt: skip
        assert what in card.missing
    assert card.files == {}
    assert row(section(card.text, "Training"), "Steps") == [NOT_RECORDED]
    assert f"Evaluation: {NOT_RECORDED}." in card.text
    assert f"Measured speed against dense: {NOT_RECORDED}." in card.text
    assert "license" not in ModelCard(card.text).data.to_dict()
    assert row(section(card.text, "Token budget"), "any")[0] == "16"


def test_a_summary_of_an_older_version_still_makes_a_card(copy):
    path = copy.checkpoint / "train_summary.json"
    values = json.loads(path.read_text())
    del values["record"]
    path.write_text(json.dumps({**values, "train_seconds": 7200.0, "world_size": 8}))
    card = make_card(copy.checkpoint, copy.options())
    training = section(card.text, "Training")
    assert row(training, "Devices x hours")[1] == "16.0"
    assert row(training, "Versions")[1] == NOT_RECORDED
    assert "versions" in card.missing
    assert "cannot be told" in row(section(card.text, "Training data"), "Is the manifest that the run read")[0]


def test_hardware_of_the_card_file_is_marked_as_such(copy):
    path = copy.checkpoint / "train_summary.json"
    values = json.loads(path.read_text())
    del values["record"]
    path.write_text(json.dumps(values))
    (copy.root / "card.yaml").write_text("hardware: 8 x A100")
    training = section(make_card(copy.checkpoint, copy.options()).text, "Training")
    assert row(training, "Hardware")[1] == "8 x A100 (as its authors say)"


def test_a_checkpoint_inside_a_run_is_told_as_one(copy):
    inside = copy.checkpoint / "checkpoint-2"
    inside.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(copy.checkpoint / name, inside / name)
    card = make_card(inside, copy.options(eval_reports=[], speed_reports=[]))
    training = section(card.text, "Training")
    assert row(training, "Steps")[1] == "2"
    assert row(training, "Final loss")[1].endswith("(mean of the last 2 logged)")
    assert "checkpoint of step 2 of that run" in training


def test_a_checkpoint_of_a_run_that_is_not_finished(copy):
    """Its marker has the settings; a line that a killed run left torn is passed over."""
    inside = copy.checkpoint / "checkpoint-3"
    inside.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(copy.checkpoint / name, inside / name)
    summary = json.loads((copy.checkpoint / "train_summary.json").read_text())
    (copy.checkpoint / "train_summary.json").unlink()
    mark_complete(inside, 3, 1, summary["settings"])
    path = copy.checkpoint / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    card = make_card(inside, CardOptions())
    training = section(card.text, "Training")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:3]]
    assert row(training, "Steps") == ["3"]
    assert row(training, "Time") == [f"{rows[-1]['seconds']:.1f} s"]
    assert row(training, "Batch") == ["2"]
    assert row(training, "Samples") == [NOT_RECORDED]
    assert row(section(card.text, "Settings of the run"), "`model_max_length`") == ["256"]


def test_another_licence_goes_under_its_name(copy):
    (copy.root / "card.yaml").write_text("license: My own terms\nbase_licenses: {a/b: llama3}")
    card = make_card(copy.checkpoint, copy.options(base_models=("a/b",)))
    data = yaml.safe_load(card.text.split("---\n")[1])
    assert (data["license"], data["license_name"], data["base_model"]) == ("other", "my-own-terms", ["a/b"])
    assert row(section(card.text, "Licences"), "a/b") == ["llama3"]
    assert row(section(card.text, "Licences"), "these weights") == ["My own terms"]
