"""LLaVA's own checkpoints as they are: read, answered from, and refused where they ask for what is not here. The
oracles are the files' own tensors, sentencepiece, and transformers' LLaVA and LLaVA-NeXT on the same weights."""

from __future__ import annotations

import json
import logging
import socket

import pytest
import sentencepiece
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.mm_utils import process_images
from llava_sv.model.builder import load_pretrained_model
from llava_sv.model.checkpoint_io import out_of_reach
from llava_sv.model.llava_layout import weight_names
from llava_sv.model.loading import read_config
from tests.model import liuhaotian
from tests.model.liuhaotian import SIDE, V15, V16, V16_MISTRAL, VOCABULARY

IMAGE_ID = 63
TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return liuhaotian.make_encoder(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture(scope="module")
def v15(clip, tmp_path_factory):
    """(folder, its weights)."""
    folder = tmp_path_factory.mktemp("v15") / "llava-v1.5-7b"
    return folder, liuhaotian.make_v15(folder, clip)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def v16(request, clip, tmp_path_factory):
    """(folder, its weights, config.json)."""
    base = V16 if request.param == "llama" else V16_MISTRAL
    folder = tmp_path_factory.mktemp("v16") / "llava-v1.6"
    return folder, liuhaotian.make_v16(folder, clip, base), base


def load(folder, **options):
    return load_pretrained_model(str(folder), device="cpu", **options)


def edited(folder, target, drop=(), **changes):
    """A copy of the folder with other fields in its config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    values = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))
    return target


def stock(kind, config, base, weights, encoder):
    """transformers' own model with the weights of the files: LLaVA's names, renamed here by hand."""
    of_text = {
        name: base[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    text = (MistralConfig if base["model_type"] == "llava_mistral" else LlamaConfig)(
        **of_text,
        num_key_value_heads=base["num_key_value_heads"],
        rms_norm_eps=base["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": base.get("rope_theta", 10000.0)},
        sliding_window=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
    )
    settings = dict(image_token_index=IMAGE_ID, vision_feature_layer=-2, vision_feature_select_strategy="default")
    model = kind(config(vision_config=vision, text_config=text, **settings)).eval()
    renamed = {f"model.vision_tower.{name}": value for name, value in encoder.items()}
    for name, value in weights.items():
        name = name.replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
        name = name.replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
        if name.startswith(("model.layers", "model.norm", "model.embed_tokens")):
            name = name.replace("model.", "model.language_model.", 1)
        if not name.startswith(TOWER):
            renamed[name] = value
    if "model.vision_tower.embeddings.class_embedding" not in model.state_dict():
        renamed = {k.replace("model.vision_tower.", "model.vision_tower.vision_model."): v for k, v in renamed.items()}
    model.load_state_dict(renamed)
    return model


def of_clip(clip):
    weights = load_file(clip / "model.safetensors")
    return {k.removeprefix("vision_model."): v for k, v in weights.items() if liuhaotian.is_vision(k)}


def test_which_encoder_is_used_is_logged(v15, v16, clip, caplog):
    with caplog.at_level(logging.INFO, "llava_sv"):
        read_config(str(v15[0]))
        read_config(str(v16[0]))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{v15[0]}: the vision encoder's weights are those of {clip}",
        f"{v16[0]}: the vision encoder's weights are those of the checkpoint itself",
    ]


def test_v15_has_the_files_own_weights_and_the_named_encoder(v15, clip):
    folder, weights = v15
    assert sorted(path.name for path in folder.glob("pytorch_model*")) == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]
    _, model, processor, length = load(folder)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    for name, value in of_clip(clip).items():
        assert torch.equal(state[TOWER + name], value)
    assert (length, processor.crop_size["height"]) == (2048, SIDE)
    assert model.config.skip_vision is None
    assert model.config.conv_template == "v1"


def test_v15_answers_as_transformers_llava(v15, clip):
    folder, weights = v15
    tokenizer, model, processor, _ = load(folder)
    twin = stock(LlavaForConditionalGeneration, LlavaConfig, V15, weights, of_clip(clip))
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    pixels = process_images([picture], processor, model.config)
    ids = [1, *tokenizer("is there a red circle", add_special_tokens=False).input_ids]
    count = (SIDE // 8) ** 2
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([[1, -200, *ids[1:]]]), images=pixels).logits[0]
        theirs = twin(input_ids=torch.tensor([[1, *[IMAGE_ID] * count, *ids[1:]]]), pixel_values=pixels).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_the_slow_tokenizer_gives_sentencepiece_s_ids(v15, tmp_path, model_type):
    """transformers takes `llava` for a model of its own, with another kind of tokenizer."""
    folder = edited(v15[0], tmp_path / "it", model_type=model_type)
    assert not (folder / "tokenizer.json").exists()
    tokenizer = load(folder)[0]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("is there a red circle?", "no, there is none", "USER: what is it ASSISTANT: a blue square"):
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)]
    assert tokenizer.decode([1, *pieces.encode("a blue square")], skip_special_tokens=True) == "a blue square"
    assert tokenizer.pad_token == "<unk>"
    assert len(tokenizer) == VOCABULARY


def test_v16_answers_as_transformers_llava_next(v16):
    """Its own trained encoder and newline, not the encoder that config.json names."""
    folder, weights, base = v16
    _, model, processor, length = load(folder)
    encoder = {name.removeprefix(TOWER): value for name, value in weights.items() if name.startswith(TOWER)}
    twin = stock(
        LlavaNextForConditionalGeneration,
        lambda **rest: LlavaNextConfig(image_grid_pinpoints=[[h, w] for w, h in V16["image_grid_pinpoints"]], **rest),
        base,
        weights,
        encoder,
    )
    assert (model.config.mm_family, model.config.image_aspect_ratio, length) == ("llava_hd", "anyres", 4096)
    for width, height in ((70, 64), (32, 32), (100, 40), (30, 90)):
        picture = Image.effect_noise((width, height), 80).convert("RGB")
        views = process_images([picture], processor, model.config)[0]
        count = model.config.visual_tokens_per_image((width, height))
        with torch.no_grad():
            ids = torch.tensor([[1, -200, 7, 8, 9]])
            ours = model(input_ids=ids, images=[views], image_sizes=[(width, height)]).logits[0]
            padded = torch.tensor([[1, *[IMAGE_ID] * count, 7, 8, 9]])
            sizes = torch.tensor([[height, width]])
            theirs = twin(input_ids=padded, pixel_values=views[None], image_sizes=sizes).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_v16_is_saved_under_this_project_s_names(v16, tmp_path):
    folder, weights, _ = v16
    tokenizer, model, processor, _ = load(folder)
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert "model.image_newline" not in saved
    assert torch.equal(saved["model.mm_projector.image_newline"], weights["model.image_newline"])
    again = load(tmp_path / "ours")[1].state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_pinpoints_written_as_text(v16, tmp_path):
    text = str([tuple(pair) for pair in V16["image_grid_pinpoints"]])
    folder = edited(v16[0], tmp_path / "it", image_grid_pinpoints=text)
    assert load(folder)[1].config.image_grid_pinpoints == V16["image_grid_pinpoints"]


def test_an_older_config_means_a_linear_projector(clip, tmp_path):
    """LLaVA's first config.json had no mm_projector_type, no image_aspect_ratio, no mm_vision_select_feature."""
    folder = tmp_path / "llava-7b"
    liuhaotian.make_v15(folder, clip)
    drop = ("mm_projector_type", "image_aspect_ratio", "mm_vision_select_feature", "image_grid_pinpoints")
    with pytest.raises(UserError, match=r"mm_projector\.(0|weight|bias)"):
        load(edited(folder, tmp_path / "mlp", drop))
    names = [folder / f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    (file,) = (name for name in names if "model.mm_projector.0.weight" in torch.load(name, weights_only=True))
    values = torch.load(file, weights_only=True)
    for key in ("weight", "bias"):
        values[f"model.mm_projector.{key}"] = values.pop(f"model.mm_projector.0.{key}")
        values.pop(f"model.mm_projector.2.{key}")
    torch.save(values, file)
    index = {"metadata": {}, "weight_map": {k: n.name for n in names for k in torch.load(n, weights_only=True)}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = load(edited(folder, tmp_path / "linear", drop))[1]
    assert (model.config.mm_projector_type, model.config.image_aspect_ratio) == ("linear", "square")


REFUSED = [
    ("v15", {"mm_use_im_start_end": True}, "mm_use_im_start_end True: marks before and after an image (LLaVA 1.0)"),
    ("v15", {"mm_use_im_patch_token": True}, "mm_use_im_patch_token True: a patch token in the vocabulary"),
    ("v15", {"s2": True}, "s2 True: an encoder run at several scales (S2) is not supported"),
    ("v15", {"mm_resampler_type": "qformer"}, "mm_resampler_type 'qformer': a resampler after the encoder"),
    ("v15", {"mm_projector_type": "mlp2x_res2x_gelu"}, "mm_projector_type: unknown projector 'mlp2x_res2x_gelu'"),
    (
        "v15",
        {"mm_patch_merge_type": "spatial_unpad"},
        "mm_patch_merge_type 'spatial_unpad' with image_aspect_ratio 'pad'",
    ),
    ("v16", {"mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat' with image_aspect_ratio 'anyres'"),
    ("v16", {"mm_patch_merge_type": None}, "mm_patch_merge_type 'flat' with image_aspect_ratio 'anyres'"),
    ("v16", {"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type 'spatial' with image_aspect_ratio 'anyres'"),
    ("v16", {"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9': only 'anyres' is read"),
    ("v16", {"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints '(1x1),...,(6x6)': expected a list"),
    ("v15", {"_name_or_path": "liuhaotian/LLaVA-7b-delta-v0"}, "holds delta weights (LLaVA-7b-delta-v0)"),
    ("v15", {"mm_vision_tower": "/no/such/clip"}, "vision tower /no/such/clip: cannot read its config.json"),
    ("v15", {"model_type": "llava_mpt"}, "model_type 'llava_mpt', not a LLaVA"),
]


@pytest.mark.parametrize(("kind", "changes", "said"), REFUSED)
def test_one_line_names_the_field(v15, clip, tmp_path, capfd, kind, changes, said, request):
    if kind == "v15":
        source = v15[0]
    else:
        source = tmp_path / "source"
        liuhaotian.make_v16(source, clip)
    folder = edited(source, tmp_path / "it", **changes)
    assert cli.main(["chat", "--model-path", str(folder), "--device", "cpu", "--prompt", "what is it"]) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert said in line
    assert str(folder) in line


def test_where_the_encoder_lies(v15, clip, tmp_path, monkeypatch, capfd):
    """config.json names it on the hub, which is not asked where it cannot be reached."""
    folder = edited(v15[0], tmp_path / "it", mm_vision_tower="openai/clip-vit-large-patch14-336")

    def no_network(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("llava_sv.model.checkpoint_io.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert out_of_reach()
    asked = []
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda *a, **k: asked.append(a))
    words = ["chat", "--model-path", str(folder), "--device", "cpu", "--prompt", "what is it", "--max-new-tokens", "2"]
    assert cli.main(words) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert "vision tower openai/clip-vit-large-patch14-336: cannot read its config.json" in line
    assert "hf download openai/clip-vit-large-patch14-336" in line
    assert "--vision-tower FOLDER" in line
    assert not asked
    assert cli.main([*words, "--vision-tower", str(clip)]) == 0
    model = load(folder, vision_tower=str(clip))[1]
    assert torch.equal(model.state_dict()[TOWER + "post_layernorm.weight"], of_clip(clip)["post_layernorm.weight"])


def test_a_held_encoder_takes_its_description_from_the_given_folder(v16, clip, tmp_path):
    """v1.6: the weights are the checkpoint's own, whatever lies in the folder."""
    folder = edited(v16[0], tmp_path / "it", mm_vision_tower="openai/clip-vit-large-patch14-336")
    state = load(folder, vision_tower=str(clip))[1].state_dict()
    assert all(torch.equal(state[name], value) for name, value in v16[1].items() if name.startswith(TOWER))


def test_a_described_encoder_needs_no_folder(v15, clip, tmp_path):
    for part in load(v15[0])[:3]:
        part.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=r"holds its encoder.*drop --vision-tower"):
        load(tmp_path / "ours", vision_tower=str(clip))


def test_a_folder_that_describes_the_encoder_and_does_not_hold_it(v15, clip, tmp_path):
    """A projector that pretraining here wrote: the encoder may lie elsewhere than it did."""
    base = liuhaotian.make_base(tmp_path / "vicuna")
    model = load(v15[0])[1]
    model.config.mm_vision_tower = "/no/such/clip"
    model.config.save_pretrained(tmp_path / "projector")
    projector = {name: value for name, value in v15[1].items() if "mm_projector" in name}
    torch.save(projector, tmp_path / "projector" / "mm_projector.bin")
    with pytest.raises(UserError, match="/no/such/clip"):
        load(tmp_path / "projector", model_base=str(base))
    state = load(tmp_path / "projector", model_base=str(base), vision_tower=str(clip))[1].state_dict()
    assert all(torch.equal(state[name], value) for name, value in projector.items())


def test_eval_and_chat_take_the_flag(v15, clip, tmp_path, monkeypatch):
    found = []

    def stop(*args, **options):
        found.append(options["vision_tower"])
        raise UserError("enough")

    monkeypatch.setattr("llava_sv.serve.cli.load_for_inference", stop)
    monkeypatch.setattr("llava_sv.eval.cli.load_for_inference", stop)
    monkeypatch.setattr("llava_sv.eval.cli.load_questions", lambda *_: [])
    words = ["--model-path", str(v15[0]), "--vision-tower", str(clip)]
    assert cli.main(["chat", *words]) == 2
    assert cli.main(["eval", *words, "--task", "toy", "--json", str(tmp_path / "it.json")]) == 2
    assert found == [str(clip)] * 2


def test_a_projector_on_its_base(v15, clip, tmp_path):
    """The same weights as the whole v1.5 checkpoint: the same logits."""
    base = liuhaotian.make_base(tmp_path / "vicuna")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": V15["rms_norm_eps"]}))
    liuhaotian.make_projector(tmp_path / "projector", clip)
    with pytest.raises(UserError, match="holds a projector alone; name its language model with --model-base"):
        load(tmp_path / "projector")
    tokenizer, model, *_ = load(tmp_path / "projector", model_base=str(base))
    whole = load(v15[0])[1]
    images = torch.linspace(-1, 1, 3 * SIDE * SIDE).view(1, 3, SIDE, SIDE).sin()
    with torch.no_grad():
        ours, expected = (
            one(input_ids=torch.tensor([[1, -200, 7, 8]]), images=images).logits for one in (model, whole)
        )
    assert torch.equal(ours, expected)
    assert tokenizer("a red").input_ids[0] == 1


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_lora_on_the_base_that_it_remembers(clip, tmp_path, kind):
    """The oracle of the adapters is peft, on the language model alone."""
    base = liuhaotian.make_base(tmp_path / "vicuna")
    saved = liuhaotian.make_lora(tmp_path / "llava-lora", clip, str(base), kind)
    model = load(tmp_path / "llava-lora")[1]
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(tmp_path / "llava-lora"))
    expected = expected.merge_and_unload().eval()
    ids = torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    for name, value in saved.items():
        if "mm_projector" in name:
            assert torch.equal(model.state_dict()[name.removeprefix("base_model.model.")], value)
    other = liuhaotian.make_base(tmp_path / "other", seed=9)
    moved = load(tmp_path / "llava-lora", model_base=str(other))[1]
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(moved.state_dict()[key], load_file(other / "model.safetensors")[key])


def test_lora_on_a_whole_v16_keeps_that_one_s_encoder(clip, tmp_path):
    folder = tmp_path / "llava-v1.6"
    weights = liuhaotian.make_v16(folder, clip)
    liuhaotian.make_lora(tmp_path / "lora", clip, str(folder))
    (tmp_path / "lora" / "config.json").write_text((folder / "config.json").read_text())
    state = load(tmp_path / "lora")[1].state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items() if name.startswith(TOWER))
    assert torch.equal(state["model.mm_projector.image_newline"], weights["model.image_newline"])


def test_names_without_values(v15, v16, tmp_path):
    assert {name for name in weight_names(str(v15[0])) if "inv_freq" not in name} == set(v15[1])
    assert set(weight_names(str(v16[0]))) == set(v16[1])
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert weight_names(str(tmp_path)) == ["a"]
    assert weight_names(str(tmp_path / "none")) == []
