"""A dense plan made to skip equals the model that is built to skip, to the last bit; and what cannot be made."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from llava_sv.errors import UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.model.builders import build_model
from llava_sv.release import from_llava
from llava_sv.release.skipping import drop_skipping, fresh_newline, make_skipping
from tests.model import liuhaotian
from tests.release.plans import assert_equal, logits, write_sv
from tests.train.lora_runs import built as built_by_training
from tests.train.runs import losses, run
from tests.train.tiny import World

SKIP = {"num_retained": 4, "num_skipped": 5}
NEWLINE = "model.mm_projector.image_newline"
SUMMARIES = {f"model.mm_projector.summary.{name}.weight" for name in ("former", "latter")}

FAMILIES = {
    "llava": ({}, SKIP),
    "norm": ({}, {**SKIP, "summary_norm": "layernorm"}),
    "former": ({}, {**SKIP, "latter_summary": False, "skip_layers": "1"}),
    "no-merge": ({}, {"num_retained": 4, "merge": False}),
    "linear": ({"mm_projector_type": "linear"}, SKIP),
    "hd": ({"mm_family": "llava_hd"}, {"num_skipped": 8}),
    "anyres": ({"mm_family": "llava_hd", "image_aspect_ratio": "anyres"}, {"num_retained": 12, "num_skipped": 8}),
    "cos": ({"mm_family": "cos", "mm_projector_type": "cos_336"}, {}),
    "auto": ({}, {"num_retained": "auto", "retained_mean": 6, "num_skipped": 4, "retained_threshold": 0.5}),
}
"""(settings, what is asked of skipping)."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(language model, encoder)."""
    folder = tmp_path_factory.mktemp("bases")
    return liuhaotian.make_base(folder / "vicuna"), liuhaotian.make_encoder(folder / "clip")


def built(bases, folder, skip, settings, projector=None):
    """A checkpoint as the builders make it; projector: state of another's to take over."""
    family = settings.get("mm_family", "llava")
    rest = {name: value for name, value in settings.items() if name != "mm_family"}
    torch.manual_seed(3)
    parts = build_model(family, *map(str, bases), skip_vision=skip, conv_template="v1", **rest)
    if projector is not None:
        parts[1].get_model().mm_projector.load_state_dict(projector, strict=False)
    for part in parts:
        part.save_pretrained(folder)
    return parts[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_a_model_built_to_skip(bases, tmp_path, name):
    settings, skip = FAMILIES[name]
    dense = built(bases, tmp_path / "dense", None, settings)
    kept = dict(dense.get_model().mm_projector.state_dict())
    kept.pop("image_newline", None)
    built(bases, tmp_path / "built", skip, settings, kept)
    made = make_skipping(from_llava.read(tmp_path / "dense"), skip)
    folder = write_sv(made, tmp_path / "made")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "built"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype for key, value in ours.items())
    config = json.loads((tmp_path / "built" / "config.json").read_text())
    assert made.config["skip_vision"] == config["skip_vision"]
    assert_equal(logits(folder), logits(tmp_path / "built"))


def test_the_given_plan_stays_dense(bases, tmp_path):
    built(bases, tmp_path / "dense", None, FAMILIES["anyres"][0])
    plan = from_llava.read(tmp_path / "dense")
    names, notes = [entry.name for entry in plan.entries], list(plan.notes)
    made = make_skipping(plan, FAMILIES["anyres"][1])
    assert [entry.name for entry in plan.entries] == names
    assert plan.notes == notes
    assert plan.config.get("skip_vision") is None
    assert {entry.name for entry in made.entries} == set(names) - {NEWLINE} | SUMMARIES
    assert "12 are retained and 8 skipped after merging; 2 summary weights are new" in made.notes[-2]
    assert made.notes[-1].startswith(f"{NEWLINE} dropped")


def test_the_projector_s_file_and_precision(bases, tmp_path):
    liuhaotian.make_v16(tmp_path / "v16", bases[1])
    plan = from_llava.read(tmp_path / "v16")
    made = make_skipping(plan, {"num_retained": 16, "num_skipped": 8})
    names = [entry.name for entry in made.entries]
    first = next(i for i, name in enumerate(names) if name in SUMMARIES)
    assert set(names[first : first + 2]) == SUMMARIES
    assert names[first - 1].startswith("model.mm_projector.")
    assert made.entries[first].file == made.entries[first - 1].file
    assert made.entries[first].dtype == made.entries[first - 1].dtype


@pytest.mark.parametrize(
    ("skip", "said"),
    [
        ({"num_retained": 14, "num_skipped": 5}, "num_retained 14 + num_skipped 5 is more than the 16 patches"),
        ({"num_retained": 16, "num_skipped": 5, "merge": False}, "leaves nothing to skip of the 16 patches"),
        ({"num_retained": 4, "num_skipped": 5, "selection": "best"}, "unknown selection 'best'"),
        ({"num_retained": 4, "num_skipped": 5, "skip_layers": "5"}, "no layer 5; this model has layers 0 to 1"),
        ({"num_retained": 4, "num_skipped": 5, "skip_kv": "fine+skipped"}, "family 'llava' has none"),
        ({"retained": 4}, "skip_vision: unknown key 'retained'"),
    ],
)
def test_a_budget_that_the_encoder_cannot_give(bases, tmp_path, skip, said):
    built(bases, tmp_path / "dense", None, {})
    with pytest.raises(UserError) as caught:
        make_skipping(from_llava.read(tmp_path / "dense"), skip)
    (line,) = str(caught.value).splitlines()
    assert said in line
    assert str(tmp_path / "dense") in line


def test_what_skips_already(bases, tmp_path):
    built(bases, tmp_path / "skip", SKIP, {})
    with pytest.raises(UserError, match="skips already"):
        make_skipping(from_llava.read(tmp_path / "skip"), SKIP)


@pytest.mark.parametrize("name", ["llava", "norm", "cos"])
def test_skipping_dropped_is_the_dense_model_again(bases, tmp_path, name):
    settings, skip = FAMILIES[name]
    built(bases, tmp_path / "dense", None, settings)
    dense = from_llava.read(tmp_path / "dense")
    again = drop_skipping(make_skipping(dense, skip))
    assert [entry.name for entry in again.entries] == [entry.name for entry in dense.entries]
    assert_equal(logits(write_sv(again, tmp_path / "again")), logits(tmp_path / "dense"))
    assert "skipping dropped: the model is dense now" in again.notes[-1]
    assert drop_skipping(dense) is dense


def test_dense_anyres_needs_a_newline_again(bases, tmp_path):
    settings, skip = FAMILIES["anyres"]
    built(bases, tmp_path / "dense", None, settings)
    again = drop_skipping(make_skipping(from_llava.read(tmp_path / "dense"), skip))
    load_pretrained_model(str(write_sv(again, tmp_path / "again")), device="cpu")
    assert again.notes[-1] == f"{NEWLINE} is new: train it, or expect worse answers"
    assert torch.equal(fresh_newline(4096), fresh_newline(4096))
    assert fresh_newline(4096).std().item() == pytest.approx(1 / 64, rel=0.05)


# -- and fine-tuning starts from it -----------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, bases):
    return World(tmp_path / "world")


def llava_folder(world, folder):
    """A dense LLaVA in its own layout, with a tokenizer that training's templates suit."""
    torch.manual_seed(0)
    tokenizer, model, _ = build_model("llava", str(world.llm), str(world.clip))
    config = model.config.to_dict()
    names = [name for name in liuhaotian.V15 if name not in ("max_length", "rope_scaling", "model_type", "torch_dtype")]
    values = {**liuhaotian.V15, **{name: config[name] for name in names if name in config}}
    values |= {"model_type": "llava_llama", "mm_vision_tower": "openai/no-such-clip", "mm_use_im_start_end": False}
    weights = {name: value for name, value in model.state_dict().items() if "vision_tower" not in name}
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(folder)
    return weights


def test_sft_starts_from_llava_s_own_folder_and_from_the_converted_one(world, tmp_path, caplog):
    """Both with skipping: the same losses. The first is given the flags, the second has them in its config.json."""
    weights = llava_folder(world, tmp_path / "llava")
    plan = make_skipping(from_llava.read(tmp_path / "llava", vision_tower=str(world.clip)), SKIP)
    made = write_sv(plan, tmp_path / "made")
    steps = ("--max_steps", "3", "--version", "llama_3")
    flags = world.flags("skip", tmp_path / "out", "--model_name_or_path", str(tmp_path / "llava"), *steps)
    with caplog.at_level(logging.WARNING):
        run(flags)
    own = [flag for flag in world.flags("sft", tmp_path / "own") if flag not in ("--vision_tower", str(world.clip))]
    run([*own, "--model_name_or_path", str(made), *steps])
    assert losses(tmp_path / "out") == losses(tmp_path / "own")
    assert len(losses(tmp_path / "out")) == 3
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) >= SUMMARIES
    changed = [name for name, value in weights.items() if not torch.equal(saved[name], value)]
    assert len(changed) > 0.9 * len(weights)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["skip_vision"]["num_retained"], config["skip_vision"]["num_skipped"]) == (4, 5)
    assert config["vision_config"]["image_size"] == 32
    load_pretrained_model(str(tmp_path / "out"), device="cpu")


def test_sft_builds_on_v16_with_its_encoder_and_without_its_newline(world, bases, tmp_path):
    weights = liuhaotian.make_v16(tmp_path / "v16", bases[1])
    steps = ("--version", "v1", "--image_aspect_ratio", "anyres", "--sv_num_retained", "12")
    flags = [word for word in world.flags("sft", tmp_path / "out") if word not in ("--vision_tower", str(world.clip))]
    model = built_by_training([*flags, "--model_name_or_path", str(tmp_path / "v16"), *steps])[0]
    state = model.state_dict()
    assert set(state) >= SUMMARIES, "skipping"
    assert NEWLINE not in state
    shared = [name for name in weights if name != "model.image_newline"]
    assert all(torch.equal(state[name], weights[name]) for name in shared)
    assert model.config.skip_vision.num_skipped == 16


def test_a_trained_encoder_is_said_in_config(world, tmp_path):
    llava_folder(world, tmp_path / "llava")
    steps = ("--max_steps", "1", "--version", "llama_3", "--unfreeze_mm_vision_tower", "True")
    run(world.flags("sft", tmp_path / "out", "--model_name_or_path", str(tmp_path / "llava"), *steps))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
