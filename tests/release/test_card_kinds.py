"""Cards of other checkpoints than a whole skipping one, and of other reports: dense, projectors, adapters, families,
other budgets, real measurements; the card file of the page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.release.card import CardOptions, make_card
from llava_sv.release.card_sources import CardFile, read_card_file
from tests.release.card_runs import change, row, section
from tests.train.tiny import SKIPPING, World


def test_a_dense_checkpoint(made):
    options = CardOptions(eval_reports=(made.dense,), speed_reports=(made.timing,))
    card = make_card(made.root / "tiny-dense", options)
    assert row(section(card.text, "Token budget"), "any") == ["16", "16", "0", "0", "16", "16", "16"]
    assert "skip-vision" not in ModelCard(card.text).data.tags
    report = json.loads(made.timing.read_text())
    shown = row(section(card.text, "Measured speed"), "time to first token (image, prefill)")
    assert shown[0] == f"{report['dense']['time_to_first_token_ms']:,.2f} ms"
    assert "whether it is this checkpoint: yes, by its fingerprint" in card.text


def test_words_follow_the_switches(copy):
    """What is merged, skipped and dropped is said as config.json has it."""
    path = copy.checkpoint / "config.json"

    def said(**switches):
        values = json.loads(path.read_text())
        values["skip_vision"] |= switches
        path.write_text(json.dumps(values))
        text = make_card(copy.checkpoint, CardOptions(name="tiny")).text
        return text.split("# tiny")[1].split("##")[0], section(text, "Known weak spots and limits")

    first, weak = said()
    assert "4 are kept whole, the rest are merged into 5 that pass attention but not the feed-forward layers." in first
    assert "2 summary tokens are added." in first
    assert "are merged into 5 tokens, skip the feed-forward layers and leave the cache after prefill" in weak
    first, weak = said(merge=False, skip_layers="1", skip_kv="none", latter_summary=False)
    assert (
        "4 are kept whole, the other 12 pass attention but not the feed-forward part of 1 of 2 decoder layers." in first
    )
    assert "One summary token is added." in first
    assert "not retained skip the feed-forward layers of 1 of 2 layers: " in weak
    first, weak = said(merge=True, skip_ffn=False, former_summary=False)
    assert "merged into 5 that pass all layers.\n" in first
    assert "not retained are merged into 5 tokens: " in weak


def test_weak_spots_are_those_of_this_checkpoint(copy):
    """Fine detail always; what else detail may decide, where this checkpoint is weak in it."""
    values = json.loads(copy.skip.read_text())
    values["per_category"] |= {"fine_detail": 0.5, "text": 0.9, "count": 0.4}
    values |= {"accuracy": 0.8, "questions_per_category": {"fine_detail": 100}}
    copy.skip.write_text(json.dumps(values))

    def lines(**more):
        options = CardOptions(eval_reports=(copy.skip,), **more)
        weak = section(make_card(copy.checkpoint, options).text, "Known weak spots and limits")
        return [line for line in weak.splitlines() if line.startswith("- ")]

    fine, counted = lines()
    assert "`fine_detail`: 50.0% (all categories: 80.0%; 95% interval 40.4% to 59.6%; chance: " in fine
    assert "`count`: 40.0%" in counted
    control = json.loads(copy.dense.read_text())
    control["per_category"] |= {"fine_detail": 0.55, "text": 0.95, "count": 0.3}
    copy.dense.write_text(json.dumps(control))
    fine, text, _ = lines(dense_reports=(copy.dense,))
    assert fine.endswith("a difference of -5.0 points, less than this number of questions can tell")
    assert text.endswith("the dense control 95.0%, a difference of -5.0 points")


def test_times_of_two_machines_are_not_compared(copy):
    timed = json.loads(copy.timing.read_text())
    for path, side in ((copy.skip, "skip"), (copy.dense, "dense")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"timing": timed[side]}))
    options = CardOptions(eval_reports=(copy.skip,), dense_reports=(copy.dense,))
    name = "each further token (decode)"
    both = row(section(make_card(copy.checkpoint, options).text, "Measured speed"), name)
    assert both[2] == f"{timed['skip']['decode_ms_per_token'] / timed['dense']['decode_ms_per_token']:.3f}"
    change(copy.dense, "environment", "device", value="Other GPU")
    speed = section(make_card(copy.checkpoint, options).text, "Measured speed")
    assert row(speed, name) == both[1:2]
    assert "the dense control was timed with another device, and is not compared" in speed


def test_a_bench_of_a_slice_says_so(copy):
    values = json.loads(copy.infer.read_text()) | {"layers": 4, "all_layers": 32}
    copy.infer.write_text(json.dumps(values))
    speed = section(make_card(copy.checkpoint, CardOptions(speed_reports=(copy.infer,))).text, "Measured speed")
    assert "has 2 decoder layers of width 32" in speed
    assert "(4 of its 32 decoder layers)" in speed


def test_a_projector_alone(made):
    card = make_card(made.pretrain, CardOptions())
    assert row(section(card.text, "Training"), "What trained") == ["pretraining: the projector alone"]
    assert "adapters or a projector" in section(card.text, "What it is")


@pytest.mark.parametrize(
    ("named", "shown", "look"),
    [
        ("/data/models/clip", "models/clip", "the model's own page"),
        ("openai/clip", "openai/clip", "https://huggingface.co/openai/clip"),
    ],
)
def test_a_folder_is_not_taken_for_a_page_of_the_hub(made, tmp_path, named, shown, look):
    """After a conversion no run says which of the names are folders: a path shown by its last parts is one."""
    folder = shutil.copytree(made.root / "tiny-dense", tmp_path / "converted")
    change(folder / "config.json", "mm_vision_tower", value=named)
    card = make_card(folder, CardOptions())
    assert row(section(card.text, "What it is"), "Made from") == [shown]
    assert ModelCard(card.text).data.base_model == ([named] if shown == named else None)
    assert row(section(card.text, "Licences"), shown) == [f"not recorded: look at {look}"]


@pytest.mark.parametrize("family", ["llava_hd", "cos"])
def test_families(tmp_path, family):
    world = World(tmp_path)
    output = tmp_path / family
    assert cli.main(["train", *world.flags("sft", output, "--max_steps", "1", *SKIPPING[family])]) == 0
    card = make_card(output, CardOptions())
    budget = section(card.text, "Token budget")
    if family == "cos":
        assert row(budget, "any")[:4] == ["80", "16", "8", "2"]
    else:
        assert row(budget, "overview only") == ["16", "16", "0", "1", "17", "17", "17"]
        assert row(budget, "2 x 2 tiles")[:5] == ["80", "16", "8", "2", "26"]


def test_adapters(tmp_path):
    world = World(tmp_path)
    flags = world.flags("skip", tmp_path / "lora", "--max_steps", "1", "--lora_enable", "True", "--lora_r", "4")
    assert cli.main(["train", *flags]) == 0
    card = make_card(tmp_path / "lora", CardOptions())
    training = section(card.text, "Training")
    assert row(training, "What trained") == [
        "fine-tuning: LoRA adapters of the language model and the projector with its summaries"
    ]
    assert "r 4" in row(training, "LoRA")[0]
    assert "the whole model has" in section(card.text, "What it is")


def test_other_budgets(made, tmp_path):
    asked = ("--budgets", "2/5,4/5,dense", "--data-path", str(made.root / "bench"), "--limit", "4", "--device", "cpu")
    folder = ("--model-path", str(made.checkpoint), "--output", str(tmp_path))
    assert cli.main(["analyze", "tradeoff", *folder, *asked]) == 0
    path = tmp_path / "tradeoff.json"
    report = json.loads(path.read_text())

    def weak():
        return section(
            make_card(made.checkpoint, CardOptions(speed_reports=(path,))).text, "Known weak spots and limits"
        )

    assert "4 questions of toy (of this checkpoint: yes, by its fingerprint)" in weak()
    for one, name in zip(report["rows"], ("2/5", "4/5 (as trained)", "dense")):
        shown = row(weak(), name)
        assert shown[:2] == [str(one["visual_tokens"]), f"{100 * one['accuracy']:.1f}%"]
        assert shown[3] == f"{one['flops_ratio']:.3f}"
    change(path, "rows", 0, "accuracy", value=0.4321)
    assert row(weak(), "2/5")[1] == "43.2%"
    change(path, "identity", "weights", value="0")
    with pytest.raises(UserError, match=r"tradeoff.json: is a report of another checkpoint"):
        weak()


def test_the_pages_card_file_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "ModelCard.md").read_text()
    path = tmp_path / "card.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    read = read_card_file(path)
    assert read.license == "apache-2.0"
    assert all(getattr(read, one.name) for one in fields(CardFile))


@pytest.mark.slow
def test_real_reports_of_speed(made, tmp_path):
    """`llava-sv bench` writes what the card reads."""
    for kind, what in (("infer", "prefill (image and first token)"), ("train", "step, decoder")):
        path = tmp_path / f"{kind}.json"
        assert cli.main(["bench", kind, "--size", "tiny", "--repeats", "1", "--json", str(path)]) == 0
        card = make_card(made.checkpoint, CardOptions(speed_reports=(path,)))
        speed = section(card.text, "Measured speed")
        report = json.loads(path.read_text())
        side = report if kind == "infer" else report["regions"]["llm"]
        key = "prefill_ms" if kind == "infer" else "step_ms"
        assert row(speed, what)[1] == f"{side['skip'][key]:,.2f} ms"
        assert "Measured at 8 retained and 12 skipped tokens; this checkpoint has 4 and 5." in speed
        assert report["environment"]["torch"] in speed
