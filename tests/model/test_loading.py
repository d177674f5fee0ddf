"""Models from base checkpoints, saved, loaded again, and every complaint about a checkpoint."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel, LlamaForCausalLM

from llava_sv.errors import UserError
from llava_sv.model import LlavaLlamaForCausalLM, SkipVisionConfig
from llava_sv.model.builder import KEPT_ON_BASE, load_pretrained_model
from llava_sv.model.builders import BUILDERS, build_model
from tests.model.checkpoints import make_clip, make_llm

SKIP = {"num_retained": 4, "num_skipped": 5}
IDS = torch.tensor([[0, 3, -200, 4, 5]])
IMAGES = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).sin()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return str(make_llm(root / "llm")), str(make_clip(root / "clip"))


@pytest.fixture(params=[None, SKIP], ids=["dense", "skip"])
def saved(request, bases, tmp_path):
    """A model of each family and kind, saved as training saves it: (folder, model)."""
    tokenizer, model, processor = build_model("llava", *bases, skip_vision=request.param)
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, images=IMAGES).logits


@pytest.mark.parametrize("family", BUILDERS)
def test_built_of_the_bases_own_weights(bases, family):
    llm, clip = bases
    _, model, processor = build_model(family, llm, clip, skip_vision=SKIP)
    text = LlamaForCausalLM.from_pretrained(llm).state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in text.items())
    vision = CLIPVisionModel.from_pretrained(clip).state_dict()
    if family == "cos":
        vision.pop("embeddings.position_embedding.weight")  # interpolated to twice the size
    assert all(torch.equal(model.get_vision_tower().model.state_dict()[key], value) for key, value in vision.items())
    assert not any(p.requires_grad for p in model.get_vision_tower().parameters())
    assert processor.crop_size["height"] == model.config.vision_config["image_size"] == (64 if family == "cos" else 32)
    assert model.config.skip_vision == SkipVisionConfig(**SKIP)
    assert not own["model.mm_projector.summary.former.weight"].any()
    if family == "cos":
        return
    bound = 1 / 32**0.5
    first = own["model.mm_projector.0.weight"]
    assert 0.9 * bound < first.abs().max() <= bound, "torch's own initialisation of a linear layer"


def test_a_vision_only_clip_serves_too(bases, tmp_path):
    _, model, _ = build_model("llava", bases[0], str(make_clip(tmp_path / "clip", whole=False)))
    assert model.config.num_patches == 16


def test_saved_and_loaded_gives_the_same_logits(saved):
    path, model = saved
    tokenizer, loaded, processor, context = load_pretrained_model(path)
    assert torch.equal(logits(loaded), logits(model))
    assert context == 256
    assert tokenizer.pad_token_id == loaded.generation_config.pad_token_id
    assert processor.crop_size["height"] == 32
    assert not loaded.training


def test_auto_classes_load_it(saved):
    path, model = saved
    assert AutoConfig.from_pretrained(path).skip_vision == model.config.skip_vision
    loaded = AutoModelForCausalLM.from_pretrained(path).eval()
    assert type(loaded) is LlavaLlamaForCausalLM
    assert torch.equal(logits(loaded), logits(model))


def test_keys_on_disk_are_llava_s(saved):
    keys = set(load_file(saved[0] + "/model.safetensors"))
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias", "model.layers.0.mlp.up_proj.weight"} <= keys
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in keys
    assert ("model.mm_projector.summary.latter.weight" in keys) == (saved[1].config.skip_vision is not None)


def test_llava_s_own_checkpoint_layout_loads(saved, bases):
    """model_type `llava`, no vision_config: the encoder is fetched from where mm_vision_tower points."""
    path, model = saved
    edit_config(path, model_type="llava", vision_config=None, mm_vision_tower=bases[1], mm_use_im_start_end=False)
    weights = load_file(path + "/model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "vision_tower" not in k}, path + "/model.safetensors", {"format": "pt"}
    )
    assert torch.equal(logits(load_pretrained_model(path)[1]), logits(model))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_projector_alone_loads_on_its_base(bases, tmp_path, kind):
    _, model, _ = build_model("llava", *bases)
    model.config.save_pretrained(tmp_path)
    weights = {f"model.mm_projector.{k}": v.clone() for k, v in model.get_model().mm_projector.state_dict().items()}
    if kind == "bin":
        torch.save(weights, tmp_path / "mm_projector.bin")
    else:
        save_file(weights, tmp_path / "mm_projector.safetensors")
    _, loaded, _, _ = load_pretrained_model(str(tmp_path), model_base=bases[0])
    assert torch.equal(logits(loaded), logits(model.eval()))
    with pytest.raises(UserError, match="holds a projector alone; name its language model"):
        load_pretrained_model(str(tmp_path))


def edit_config(path: str, **changes) -> None:
    with open(path + "/config.json") as file:
        config = json.load(file)
    config.update(changes)
    with open(path + "/config.json", "w") as file:
        json.dump(config, file)


def edit_weights(path: str, drop: str | None = None, add: str | None = None, reshape: str | None = None) -> None:
    weights = load_file(path + "/model.safetensors")
    if drop:
        del weights[drop]
    if add:
        weights[add] = torch.zeros(2)
    if reshape:
        weights[reshape] = weights[reshape][:-1].clone()
    save_file(weights, path + "/model.safetensors", {"format": "pt"})


def test_missing_keys_are_named_and_new_ones_must_be_asked_for(saved):
    path, _ = saved
    edit_weights(path, drop="model.mm_projector.2.bias")
    with pytest.raises(UserError, match=r"lacks 1 key\(s\): model.mm_projector.2.bias; they would start untrained"):
        load_pretrained_model(path)
    _, model, _, _ = load_pretrained_model(path, allow_new_weights=("model.mm_projector.2.",))
    assert model.get_model().mm_projector.get_submodule("2").bias.isfinite().all()


def test_unexpected_keys_are_named(saved):
    edit_weights(saved[0], add="model.layers.7.extra")
    with pytest.raises(UserError, match=r"unlike its config, 1 key\(s\): model.layers.7.extra"):
        load_pretrained_model(saved[0])


def test_misshapen_keys_are_named(saved):
    edit_weights(saved[0], reshape="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match=r"another shape than its config says.* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained_model(saved[0])


def test_a_pointer_instead_of_weights_is_said(bases, tmp_path):
    (tmp_path / "mm_projector.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match=r"mm_projector\.bin: cannot be read"):
        build_model("llava", *bases, pretrain_mm_mlp_adapter=str(tmp_path))
    torch.save([1, 2], tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="hold a list, not a dict of tensors"):
        build_model("llava", *bases, pretrain_mm_mlp_adapter=str(tmp_path))


def test_auto_classes_take_a_block_of_settings(bases, tmp_path):
    build_model("llava", *bases, skip_vision=SKIP)[1].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, skip_vision={**SKIP, "skip_ffn": False})
    assert loaded.config.skip_vision == SkipVisionConfig(**SKIP, skip_ffn=False)
    assert not any(layer.skips for layer in loaded.model.layers)


def test_torn_weights_are_said(saved):
    with open(saved[0] + "/model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="weights cannot be read"):
        load_pretrained_model(saved[0])


def test_a_folder_without_config(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json; give the folder that training wrote"):
        load_pretrained_model(str(tmp_path))


def test_malformed_config_gives_line_and_column(saved):
    with open(saved[0] + "/config.json", "w") as file:
        file.write('{\n  "a": 1,\n  oops\n}')
    with pytest.raises(UserError, match="malformed JSON at line 3, column 3"):
        load_pretrained_model(saved[0])


def test_transformers_own_llava_is_said_to_be_that(tmp_path):
    layout = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match=r"layout of transformers' own models \(model_type 'llava'\), which is not"):
        load_pretrained_model(str(tmp_path))


def test_a_bare_language_model_is_not_a_llava(bases):
    with pytest.raises(UserError, match="model_type 'llama', not a LLaVA"):
        load_pretrained_model(bases[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_vision": {"nr": 4}}, "unknown key 'nr'; known: skip_ffn, num_retained"),
        ({"skip_vision": {**SKIP, "num_retained": 12}}, "num_retained 12 . num_skipped 5 is more than the 16 patches"),
        ({"skip_vision": {**SKIP, "num_retained": 0}}, "num_retained: expected a whole number of 1 or more, got 0"),
        ({"skip_vision": {**SKIP, "merge": "yes"}}, "skip_vision.merge: expected true or false, got 'yes'"),
        (
            {"skip_vision": {**SKIP, "selection": "best"}},
            "unknown selection 'best'; known: cls_similarity, cls_attention",
        ),
        ({"skip_vision": {**SKIP, "summary_norm": "rms"}}, "unknown value 'rms'; known: none, layernorm"),
        ({"skip_vision": {**SKIP, "skip_kv": "all"}}, "unknown level 'all'; known: none, skipped"),
        ({"skip_vision": {**SKIP, "skip_layers": [3]}}, "no layer 3; this model has layers 0 to 2"),
        ({"skip_vision": {**SKIP, "skip_layers": "odd"}}, "cannot read 'odd'; write 'all', '8-31'"),
        ({"skip_vision": {**SKIP, "skip_layers": "2-1"}}, "cannot read '2-1'"),
        (
            {"skip_vision": {**SKIP, "skip_layers": 3}},
            "skip_layers: expected 'all', a range or a list of layers, got 3",
        ),
        (
            {"skip_vision": {**SKIP, "num_retained": True}},
            "num_retained: expected a whole number of 1 or more, got True",
        ),
        ({"skip_vision": {**SKIP, "skip_kv": ["skipped"]}}, r"skip_kv: expected a name, got \['skipped'\]"),
        ({"skip_vision": [4, 5]}, "skip_vision: expected a block of settings, or null for a dense model"),
        ({"mm_vision_select_layer": -4}, "no layer -4; it has 1 to 3, or counted from the end -1 to -3"),
        ({"mm_vision_select_layer": 0}, "no layer 0; it has 1 to 3"),
        ({"mm_vision_select_feature": "all"}, "unknown 'all'; known: patch, cls_patch"),
        ({"mm_projector_type": "identity"}, "needs equal widths, but the encoder has 32 and the language model 48"),
        (
            {"image_aspect_ratio": "anyres"},
            "image_aspect_ratio: unknown 'anyres' for family llava .anyres is for --mm_family llava_hd.; known: pad",
        ),
        ({"tokenizer_padding_side": "middle"}, "tokenizer_padding_side: unknown 'middle'; known: left, right"),
        ({"hidden_size": 50}, "model config: .*hidden size"),
        ({"mm_family": "llavva"}, "unknown family 'llavva'; known: llava"),
        ({"mm_projector_type": "mlp2x"}, r"unknown projector 'mlp2x'; known: linear, identity, mlp\{k\}x_gelu"),
    ],
)
def test_wrong_settings_are_one_line_each(bases, saved, changes, message):
    """The same complaint when a checkpoint is loaded and when a model is built."""
    edit_config(saved[0], **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained_model(saved[0])
    assert "\n" not in str(caught.value)
    family = changes.get("mm_family", "llava")
    skip = changes.get("skip_vision", None)
    overrides = {k: v for k, v in changes.items() if k not in ("mm_family", "skip_vision")}
    with pytest.raises(UserError, match=message):
        build_model(family, *bases, skip_vision=skip, **overrides)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llava", {"hd_max_tiles": 2}, "hd_max_tiles is for family llava_hd, not llava; drop it"),
        ("llava", {"hd_fixed_grid": "2x2"}, "hd_fixed_grid is for family llava_hd, not llava; drop it"),
        ("cos", {"image_grid_pinpoints": [[64, 64]]}, "image_grid_pinpoints is for family llava_hd, not cos; drop it"),
        (
            "llava_hd",
            {"image_aspect_ratio": "anyres", "hd_max_tiles": 2},
            "hd_max_tiles is for image_aspect_ratio pad or square, not anyres; drop it",
        ),
        (
            "llava_hd",
            {"image_aspect_ratio": "anyres", "hd_fixed_grid": "2x2"},
            "hd_fixed_grid is for image_aspect_ratio pad or square, not anyres; drop it",
        ),
        (
            "llava_hd",
            {"image_aspect_ratio": "square", "image_grid_pinpoints": [[64, 32]]},
            "image_grid_pinpoints is for image_aspect_ratio anyres, not square; drop it",
        ),
        ("llava", {"cos_windows": [4, 2]}, "cos_windows is for mm_projector_type cos, not mlp2x_gelu; drop it"),
        ("cos", {"cos_queries": [16]}, "cos_queries is for mm_projector_type cos, not cos_80_448; drop it"),
        ("llava", {"mm_vision_feature_levels": [0]}, "mm_vision_feature_levels is for family cos, not llava; drop it"),
        ("cos", {"mm_vision_select_layer": -1}, "mm_vision_select_layer is for family llava or llava_hd, not cos"),
        ("cos", {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is for family llava, not cos"),
        ("llava_hd", {"mm_vision_select_feature": "cls_patch"}, "is for family llava, not llava_hd; drop it"),
    ],
)
def test_a_setting_that_would_not_be_read_is_refused(bases, family, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        build_model(family, *bases, **settings)
    assert "\n" not in str(caught.value)


def test_settings_with_their_default_are_fine_everywhere(bases):
    given = {
        "llava": dict(hd_max_tiles=4, hd_fixed_grid=None, cos_windows=None, mm_vision_feature_levels=None),
        "cos": dict(mm_vision_select_layer=-2, mm_vision_select_feature="patch"),
        "llava_hd": dict(image_aspect_ratio=None, hd_max_tiles=2),
    }
    for family, settings in given.items():
        config = build_model(family, *bases, **settings)[1].config
        assert {name: getattr(config, name) for name in settings} == settings


def test_what_a_projector_brings_to_its_language_model():
    """All that says how to read an image; not what building sets. A new field is one or the other: choose here too."""
    assert set(KEPT_ON_BASE) == {
        "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_vision_feature_levels",
        "mm_vision_image_size", "cos_windows", "cos_queries", "hd_max_tiles", "hd_fixed_grid", "image_grid_pinpoints",
        "image_aspect_ratio", "conv_template", "tokenizer_model_max_length",
    }  # fmt: skip


def test_an_unknown_option_is_refused(bases):
    with pytest.raises(UserError, match="unknown model option 'mm_colour'"):
        build_model("llava", *bases, mm_colour="red")


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_other_projectors_save_and_load(bases, tmp_path, projector):
    tokenizer, model, processor = build_model("llava", *bases, skip_vision=SKIP, mm_projector_type=projector)
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pretrained_model(str(tmp_path))[1]), logits(model.eval()))
    if projector == "linear":
        assert "model.mm_projector.weight" in load_file(tmp_path / "model.safetensors")


def test_a_projector_of_another_type_is_named(bases, tmp_path):
    _, model, _ = build_model("llava", *bases)
    weights = {f"model.mm_projector.{k}": v for k, v in model.get_model().mm_projector.state_dict().items()}
    torch.save(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"missing keys: 4\.bias, 4\.weight; .*mlp3x_gelu"):
        build_model("llava", *bases, pretrain_mm_mlp_adapter=str(tmp_path), mm_projector_type="mlp3x_gelu")
    with pytest.raises(UserError, match="no such file, and no folder with"):
        build_model("llava", *bases, pretrain_mm_mlp_adapter=str(tmp_path / "absent"))


def test_a_projector_of_another_width_is_named(bases, tmp_path):
    _, model, _ = build_model("llava", *bases)
    weights = {f"model.mm_projector.{k}": v for k, v in model.get_model().mm_projector.state_dict().items()}
    weights["model.mm_projector.0.weight"] = torch.zeros(48, 99)
    torch.save(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"0.weight has shape \[48, 99\], the model wants \[48, 32\]"):
        build_model("llava", *bases, pretrain_mm_mlp_adapter=str(tmp_path))


def test_bases_that_are_not_there_or_not_right(bases, tmp_path):
    llm, clip = bases
    with pytest.raises(UserError, match=r"language model .*absent: cannot read its config\.json"):
        build_model("llava", str(tmp_path / "absent"), clip)
    with pytest.raises(UserError, match=r"vision tower .*absent: cannot read its config\.json"):
        build_model("llava", llm, str(tmp_path / "absent"))
    with pytest.raises(UserError, match="its model_type is 'clip'; known: llama"):
        build_model("llava", clip, clip)
    with pytest.raises(UserError, match="unknown encoder type 'llama'; known: clip_vision_model"):
        build_model("llava", llm, llm)


def test_no_pad_token_is_set_and_said(bases, tmp_path, caplog):
    llm = make_llm(tmp_path / "llm", pad_token=None)
    with caplog.at_level(logging.WARNING):
        tokenizer, model, _ = build_model("llava", str(llm), bases[1])
    assert tokenizer.pad_token == "<unk>"
    assert model.generation_config.pad_token_id == 2
    assert "has no pad token: '<unk>' is used for padding" in caplog.text


def test_attention_that_cannot_run_is_refused(bases):
    with pytest.raises(UserError, match="unknown 'fast'; known: eager, sdpa, sdpa_varlen, flash_attention_2"):
        build_model("llava", *bases, attn_implementation="fast")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"flash_attention_2 cannot be used.*pip install 'llava-sv\[flash\]'"):
            build_model("llava", *bases, attn_implementation="flash_attention_2")


def test_quantised_loading_says_what_it_needs(saved):
    if shutil.which("nvidia-smi"):
        pytest.skip("a CUDA machine may have bitsandbytes")
    with pytest.raises(UserError, match="need bitsandbytes"):
        load_pretrained_model(saved[0], load_4bit=True)
