"""LLaVA-HD and CoS trained end to end on random tiny bases: pretraining, dense and skipping SFT, and going on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_sv.errors import UserError
from llava_sv.mm_utils import process_images
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train import build
from llava_sv.train.flags import parse
from llava_sv.train.metrics import read_metrics
from llava_sv.train.train import main, train
from tests.train.runs import run

torch.set_num_threads(1)

FAMILIES = {
    "llava_hd": {"pretrain": ["--hd_max_tiles", "1"], "sft": ["--hd_max_tiles", "4"]},
    "cos": {
        "pretrain": ["--mm_projector_type", "cos_80"],
        "sft": [
            *("--mm_projector_type", "cos_336", "--mm_vision_image_size", "64", "--unfreeze_mm_vision_tower", "True"),
            *("--mm_vision_tower_lr", "1e-4", "--mm_vision_tower_lr_decay", "0.9"),
        ],
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, world, tmp_path_factory):
    """(family, {stage: OUTPUT}, {stage: what was printed}): pretraining, then both kinds of SFT from its projector."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    outputs, printed = {}, {}
    for stage in ("pretrain", "sft", "skip"):
        outputs[stage] = folder / stage
        flags = ["--mm_family", family, *FAMILIES[family]["pretrain" if stage == "pretrain" else "sft"]]
        if stage != "pretrain":
            flags += ["--pretrain_mm_mlp_adapter", str(folder / "pretrain" / "mm_projector.bin")]
            flags += ["--group_by_modality_length", "True", "--model_max_length", "1024"]
        if stage == "skip":  # the families' own budgets: the last of these flags win
            flags += ["--sv_num_retained", "16" if family == "llava_hd" else "80", "--sv_num_skipped", "6"]
        printed[stage] = run(world.flags(stage, outputs[stage], *flags, "--gradient_checkpointing", "True"))
    return family, outputs, printed


def test_each_stage_says_what_it_trains(trained):
    family, _, printed = trained
    assert all(f"family            {family}," in text for text in printed.values())
    tokens = {
        "llava_hd": {
            "pretrain": "up to 16 dense -> 16 in the sequence (dense)",
            "sft": "up to 80 dense -> 80 in the sequence (dense)",
            "skip": "up to 80 dense -> 24 in the sequence (Skip-Vision)",
        },
        "cos": {
            "pretrain": "80 dense -> 80 in the sequence (dense)",
            "sft": "336 dense -> 336 in the sequence (dense)",
            "skip": "336 dense -> 88 in the sequence (Skip-Vision)",
        },
    }[family]
    for stage, text in tokens.items():
        assert f"tokens an image   {text}" in printed[stage]
    (tower,) = (line for line in printed["skip"].splitlines() if line.startswith("  vision tower "))
    assert tower.endswith(" 0 train") == (family == "llava_hd")


def test_losses_are_finite_and_fall(trained):
    _, outputs, _ = trained
    for stage in ("sft", "skip"):
        losses = [row["loss"] for row in read_metrics(outputs[stage] / "metrics.jsonl") if "loss" in row]
        assert len(losses) == 8
        assert all(0 < loss < 20 for loss in losses)
        assert losses[-1] < losses[0]


def test_the_saved_model_loads_and_answers(trained, world):
    family, outputs, _ = trained
    for stage in ("sft", "skip"):
        tokenizer, model, processor, _ = load_pretrained_model(str(outputs[stage]), device="cpu")
        assert model.config.mm_family == family
        assert processor.crop_size["height"] == model.config.vision_config["image_size"]
        with Image.open(sorted((world.data / "images").glob("*.png"))[0]) as image:
            pixels = process_images([image.convert("RGB")], processor, model.config)
            size = image.size
        ids = torch.tensor([[*tokenizer("What colour is it?")["input_ids"], -200]])
        with torch.no_grad():
            groups = model.encode_images(pixels, [size])
            answer = model.generate(ids, images=pixels, image_sizes=[size], max_new_tokens=3, do_sample=False)
        assert len(groups[0]) == model.config.visual_tokens_per_image(size)
        assert answer.shape[1] <= 3


def test_the_encoder_trains_where_it_is_asked_to(trained, world):
    family, outputs, _ = trained
    before = load_file(world.clip / "model.safetensors")
    after = load_file(outputs["skip"] / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.vision_model."
    changed = {
        key
        for key, value in before.items()
        if "position_embedding" not in key
        and not torch.equal(after[prefix + key.removeprefix("vision_model.")].float(), value.float())
    }
    if family == "llava_hd":
        assert not changed
        return
    # 3 blocks: levels 0 and 1 are read, so the last block and the norm after it never run
    assert any("layers.0." in key for key in changed)
    assert any("layers.1." in key for key in changed)
    assert not any("layers.2." in key or "post_layernorm" in key for key in changed)
    assert after[prefix + "embeddings.position_embedding.weight"].shape[0] == 1 + 8 * 8


def test_training_goes_on_from_a_family_s_checkpoint(trained, world, tmp_path):
    """The family, its projector and its budget come from the checkpoint; tiling may change, weights' shapes not."""
    family, outputs, _ = trained
    flags = world.flags("sft", tmp_path / "more", "--max_steps", "1", "--model_name_or_path", str(outputs["sft"]))
    at = flags.index("--vision_tower")
    flags = flags[:at] + flags[at + 2 :]
    extra = ["--hd_max_tiles", "2"] if family == "llava_hd" else []
    run([*flags, *extra, "--sv_former_summary", "True", "--model_max_length", "1024"])
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert config["mm_family"] == family
    block = config["skip_vision"]
    assert (block["num_retained"], block["num_skipped"]) == ((16, 16) if family == "llava_hd" else (80, 64))
    assert config["hd_max_tiles"] == (2 if family == "llava_hd" else 4)
    with pytest.raises(UserError, match=r"--mm_projector_type cos_80: the checkpoint .* has"):
        train(argv=[*flags, "--mm_projector_type", "cos_80", "--overwrite_output_dir", "True"])
    with pytest.raises(UserError, match=r"--mm_family llava: the checkpoint .* has"):
        train(argv=[*flags, "--mm_family", "llava", "--overwrite_output_dir", "True"])


def built_on(output, world, tmp_path, *extra):
    """The model that training would start from, on the checkpoint in `output`."""
    flags = world.flags("sft", tmp_path / "on", "--model_name_or_path", str(output), "--model_max_length", "1024")
    return build.build(*parse([*flags, *extra]))[1]


@pytest.mark.parametrize(
    ("name", "value", "has"),
    [
        ("mm_vision_select_layer", "-1", "-2"),
        ("mm_vision_select_feature", "cls_patch", "patch"),
        ("vision_tower", "openai/clip-vit-large-patch14-336", ".*clip"),
        ("mm_vision_image_size", "40", "(32|64)"),
    ],
)
def test_going_on_refuses_another_encoder(trained, world, tmp_path, name, value, has):
    _, outputs, _ = trained
    with pytest.raises(UserError, match=f"--{name} {value}: the checkpoint .* has {has}; drop the flag") as caught:
        built_on(outputs["sft"], world, tmp_path, f"--{name}", value)
    assert "\n" not in str(caught.value)


def test_going_on_takes_the_checkpoint_s_own_encoder(trained, world, tmp_path):
    """The scripts give the encoder's name, layer and size whether or not they start from a checkpoint."""
    family, outputs, _ = trained
    size = "32" if family == "llava_hd" else "64"
    flags = ["--mm_vision_select_layer", "-2", "--mm_vision_select_feature", "patch", "--mm_vision_image_size", size]
    model = built_on(outputs["sft"], world, tmp_path, *flags, "--vision_tower", f"{world.clip.parent}/./clip")
    assert model.config.mm_vision_tower == str(world.clip)
    assert model.config.vision_config["image_size"] == int(size)


def test_going_on_with_another_way_of_tiling(trained, world, tmp_path):
    """Dense `anyres` has a newline that the others lack: it comes in fresh, trains, and goes again."""
    family, outputs, _ = trained
    if family != "llava_hd":
        with pytest.raises(UserError, match=r"'anyres' for family cos \(anyres is for --mm_family llava_hd\)"):
            built_on(outputs["sft"], world, tmp_path, "--image_aspect_ratio", "anyres")
        return
    fewer = built_on(outputs["sft"], world, tmp_path, "--hd_max_tiles", "2")
    fewer.save_pretrained(tmp_path / "fewer")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(outputs["sft"] / name, tmp_path / "fewer")
    anyres = ("--image_aspect_ratio", "anyres", "--freeze_mm_mlp_adapter", "True", "--max_steps", "1")
    flags = world.flags("sft", tmp_path / "anyres", "--model_name_or_path", str(tmp_path / "fewer"), *anyres)
    run(flags)
    config = json.loads((tmp_path / "anyres" / "config.json").read_text())
    assert config.get("hd_max_tiles", 4) == 4, "what the checkpoint said of grids is not read any more"
    newline = load_file(tmp_path / "anyres" / "model.safetensors")["model.mm_projector.image_newline"]
    assert 0.5 < newline.float().std() * 32**0.5 < 1.5
    again = built_on(tmp_path / "anyres", world, tmp_path, "--image_grid_pinpoints", "[(64, 32)]", *anyres)
    assert torch.equal(again.get_model().mm_projector.image_newline, newline)
    model_args = parse([*flags, "--freeze_mm_mlp_adapter", "True"])[0]
    build.choose_trainable(again, model_args)
    trains = {name for name, value in again.get_model().mm_projector.named_parameters() if value.requires_grad}
    assert trains == {"image_newline"}
    again.save_pretrained(tmp_path / "anyres")
    for changes in (["--hd_max_tiles", "2"], ["--image_aspect_ratio", "anyres", "--sv_num_retained", "4"]):
        model = built_on(tmp_path / "anyres", world, tmp_path, *changes)
        assert model.get_model().mm_projector.image_newline is None


def test_an_image_that_fills_the_sequence_is_refused_before_the_first_step(world, tmp_path, capsys):
    flags = world.flags("sft", tmp_path, "--mm_family", "llava_hd")
    assert main([*flags, "--model_max_length", "80"]) == 2
    assert (
        "error: an image takes up to 80 tokens, but --model_max_length is 80: it would be cut away, and its answer "
        "with it; raise --model_max_length to more than 80 and a text's tokens, or let an image take fewer "
        "(--hd_max_tiles, --sv_num_retained, --sv_num_skipped)"
    ) in capsys.readouterr().err
    model_args, data_args, args = parse([*flags, "--model_max_length", "81"])
    tokenizer, model, processor = build.build(model_args, data_args, args)
    build.check_room(model.config, build.build_dataset(tokenizer, processor, data_args, "llama_3", model.config), args)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mm_family llava_hd --hd_fixed_grid 3x2", "3x2 has 6 tiles, but hd_max_tiles is 4"),
        ("--mm_family llava_hd --hd_fixed_grid two", "cannot read 'two'; write columns x rows, such as 2x2"),
        ("--mm_family llava_hd --hd_max_tiles 0", "hd_max_tiles: expected 1 or more, got 0"),
        ("--image_aspect_ratio anyres", "'anyres' for family llava (anyres is for --mm_family llava_hd)"),
        (
            "--sv_skip_kv fine+skipped --sv_num_retained 4 --sv_num_skipped 5",
            "family 'llava' has none; use 'skipped' or 'none'",
        ),
        ("--mm_family llava_hd --sv_skip_kv fine+skipped", "family 'llava_hd' has none"),
        ("--mm_family cos --mm_vision_image_size 36", "36 pixels are no multiple of the encoder's patch of 8"),
        ("--mm_family cos --mm_projector_type cos_336 --mm_vision_image_size 48", "4 windows a side do not divide"),
        (
            "--mm_family cos --mm_projector_type mlp2x_gelu",
            "'mlp2x_gelu' does not go with family 'cos', which takes cos_80",
        ),
        ("--mm_projector_type cos_80", "'cos_80' does not go with family 'llava', which takes linear"),
        ("--hd_fixed_grid 2x2", "hd_fixed_grid is for family llava_hd, not llava; drop it"),
        (
            "--mm_family cos --mm_vision_select_layer -1",
            "mm_vision_select_layer is for family llava or llava_hd, not cos",
        ),
        (
            "--mm_family cos --mm_projector_type cos --cos_windows 8,3 --cos_queries 4,64",
            "a window of 3 cells does not divide the encoder's grid of 8 x 8",
        ),
        ("--mm_family cos --cos_windows 8,x", "--cos_windows: cannot read '8,x'"),
        ("--image_grid_pinpoints [(32", "--image_grid_pinpoints: cannot read '[(32'"),
        ("--mm_family cos --mm_vision_feature_levels 2,1", "expected rising block numbers from 0 to 2, got [2, 1]"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(world, tmp_path, capsys, flags, said):
    assert main(world.flags("sft", tmp_path, *flags.split())) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not Path(tmp_path, "config.json").exists()
