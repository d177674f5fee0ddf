"""Models over every language model and encoder: built from checkpoints in their own format, saved, loaded, refused."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel

from llava_sv.errors import UserError
from llava_sv.mm_utils import image_side, load_image_processor, mean_color, process_images
from llava_sv.model.builder import load_pretrained_model
from llava_sv.model.builders import build_model
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.model.loading import read_config
from llava_sv.train import preflight
from tests.model.checkpoints import LLMS, SIGLIP_PREPROCESSOR, make_clip, make_llm, make_siglip
from tests.model.test_loading import IDS, IMAGES, edit_config, logits

SKIP = {"num_retained": 4, "num_skipped": 5}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> folder of every language model, `clip` and `siglip`."""
    root = tmp_path_factory.mktemp("bases")
    made = {kind: str(make_llm(root / kind, kind=kind)) for kind in LLMS}
    return {**made, "clip": str(make_clip(root / "clip")), "siglip": str(make_siglip(root / "siglip"))}


def save(parts, folder) -> str:
    tokenizer, model, processor = parts
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", LLMS)
@pytest.mark.parametrize(("tower", "selection"), [("clip", "cls_similarity"), ("siglip", "pool_attention")])
def test_built_trained_saved_loaded(bases, tmp_path, kind, tower, selection):
    parts = build_model("llava", bases[kind], bases[tower], skip_vision={**SKIP, "selection": selection})
    model = parts[1]
    assert type(model) is DECODERS[kind].model
    text = AutoModelForCausalLM.from_pretrained(bases[kind]).state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in text.items())

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    labels = IDS.masked_fill(IDS < 0, -100)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=labels, images=IMAGES).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]

    path = save(parts, tmp_path / "model")
    expected = logits(model.eval())
    _, loaded, processor, _ = load_pretrained_model(path, device="cpu")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), expected)
    assert image_side(processor) == 32
    assert AutoConfig.from_pretrained(path).model_type == f"llava_{kind}"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path).eval()), expected)
    assert preflight.is_llava(tmp_path / "model")
    keys = set(load_file(path + "/model.safetensors"))
    assert ("lm_head.weight" in keys) != loaded.config.tie_word_embeddings
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in keys
    answer = loaded.generate(IDS, images=IMAGES, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 3)


def test_tied_embeddings_stay_tied_through_training_and_disk(bases, tmp_path):
    parts = build_model("llava", bases["qwen2"], bases["clip"], skip_vision=SKIP)
    path = save(parts, tmp_path / "model")
    for model in (parts[1], load_pretrained_model(path, device="cpu")[1]):
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llava", "llava_hd", "cos"])
@pytest.mark.parametrize("skip", [None, {"selection": "distinctiveness"}], ids=["dense", "skip"])
def test_siglip_serves_every_family(bases, tmp_path, family, skip):
    block = None if skip is None else {**skip, **(SKIP if family == "llava" else {})}
    options = {"cos": dict(mm_projector_type="cos", cos_windows=[4, 2, 1], cos_queries=[1, 4, 16])}.get(family, {})
    options |= {"mm_vision_image_size": 32} if family == "cos" else {}
    parts = build_model(family, bases["qwen2"], bases["siglip"], skip_vision=block, **options)
    pictures = [Image.new("RGB", (50, 20), "red")]
    pixels = process_images(pictures, parts[2], parts[1].config)
    with torch.no_grad():
        expected = parts[1].eval()(input_ids=IDS, images=pixels, image_sizes=[(50, 20)]).logits
    path = save(parts, tmp_path / "model")
    _, loaded, processor, _ = load_pretrained_model(path, device="cpu")
    again = process_images(pictures, processor, loaded.config)
    with torch.no_grad():
        found = loaded(input_ids=IDS, images=again, image_sizes=[(50, 20)]).logits
    # float32; where a loaded weight lies in memory may change the order of a sum
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_siglip_weights_are_its_own(bases, tmp_path):
    _, model, _ = build_model("llava", bases["llama"], bases["siglip"])
    vision = SiglipVisionModel.from_pretrained(bases["siglip"]).state_dict()
    held = model.get_vision_tower().model.state_dict()
    assert held.keys() == vision.keys()
    assert all(torch.equal(held[key], value) for key, value in vision.items())
    part = make_siglip(tmp_path / "part", whole=False)
    _, model, _ = build_model("llava", bases["llama"], str(part))
    assert model.config.num_patches == 16


def test_siglip_at_twice_its_size(bases, tmp_path):
    parts = build_model("llava", bases["llama"], bases["siglip"], mm_vision_image_size=64)
    assert image_side(parts[2]) == 64
    assert parts[1].config.num_patches == 64
    path = save(parts, tmp_path / "model")
    assert image_side(load_pretrained_model(path, device="cpu")[2]) == 64


def test_its_own_size_may_be_named_whatever_the_patch(bases, tmp_path):
    """google/siglip-so400m-patch14-384: 384 is no multiple of 14."""
    odd = make_siglip(tmp_path / "odd", image_size=36)
    _, model, processor = build_model("llava", bases["llama"], str(odd), mm_vision_image_size=36)
    assert model.config.num_patches == 16
    assert image_side(processor) == 36
    with pytest.raises(UserError, match="35 pixels are no multiple of the encoder's patch of 8; its own size is 36"):
        build_model("llava", bases["llama"], str(odd), mm_vision_image_size=35)


@pytest.mark.parametrize("said", ["SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"])
def test_siglip_pictures_are_stretched_and_normalised_around_grey(tmp_path, said):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**SIGLIP_PREPROCESSOR, "image_processor_type": said})
    )
    processor = load_image_processor(str(tmp_path))
    assert type(processor).__name__ == "SiglipImageProcessorPil"
    assert mean_color(processor) == (127, 127, 127)
    picture = Image.new("RGB", (64, 16))
    picture.paste((255, 255, 255), (32, 0, 64, 16))
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 32, 32)
    assert (pixels[:, :, :14] == -1).all()
    assert (pixels[:, :, 18:] == 1).all()
    processor.save_pretrained(tmp_path / "again")
    assert load_image_processor(str(tmp_path / "again")).to_dict() == processor.to_dict()


def test_llava_next_s_qwen_checkpoints_are_read_as_qwen2(bases, tmp_path):
    """model_type `llava_qwen`, the encoder named and not held."""
    skipping = build_model("llava", bases["qwen2"], bases["siglip"])
    path = save(skipping, tmp_path / "model")
    edit_config(path, model_type="llava_qwen", vision_config=None, mm_vision_tower=bases["siglip"])
    weights = load_file(path + "/model.safetensors")
    kept = {key: value for key, value in weights.items() if "vision_tower" not in key}
    save_file(kept, path + "/model.safetensors", {"format": "pt"})
    assert preflight.is_llava(tmp_path / "model")
    loaded = load_pretrained_model(path, device="cpu")[1]
    assert type(loaded) is DECODERS["qwen2"].model
    assert torch.equal(logits(loaded), logits(skipping[1].eval()))


def test_an_unknown_language_model_is_refused_with_the_known(bases, tmp_path):
    folder = make_llm(tmp_path / "llm")
    edit_config(str(folder), model_type="gpt2")
    with pytest.raises(UserError, match=r"its model_type is 'gpt2'; known: llama, mistral, qwen2, qwen3$"):
        build_model("llava", str(folder), bases["clip"])


def test_an_unknown_llava_is_refused_with_the_known(bases, tmp_path):
    path = save(build_model("llava", bases["llama"], bases["clip"]), tmp_path / "model")
    edit_config(path, model_type="llava_mpt")
    known = "llava_llama, llava, llava_mistral, llava_qwen2, llava_qwen, llava_qwen3"
    with pytest.raises(UserError, match=rf"model_type 'llava_mpt', not a LLaVA \({known}; with mm_vision_tower\)"):
        read_config(path)


def test_naflex_is_refused_with_what_works(bases, tmp_path):
    for kind in ("siglip2", "siglip2_vision_model"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            UserError, match=r"NaFlex .* use a SigLIP 2 checkpoint of fixed size \(google/siglip2-so400m"
        ):
            build_model("llava", bases["llama"], str(tmp_path))


SELECTIONS = [
    ("siglip", {}, "cls_similarity", "a CLS token", "pool_attention, distinctiveness"),
    ("siglip", {}, "cls_attention", "a CLS token", "pool_attention, distinctiveness"),
    ("clip", {}, "pool_attention", "a pooling head", "cls_similarity, cls_attention, distinctiveness"),
    ("siglip", {"vision_use_head": False}, "pool_attention", "a pooling head", "distinctiveness"),
    ("siglip", {"vision_use_head": False}, "cls_similarity", "a CLS token", "distinctiveness"),
]


@pytest.mark.parametrize(("tower", "change", "selection", "lacks", "usable"), SELECTIONS)
def test_a_selection_that_an_encoder_cannot_serve(bases, tmp_path, tower, change, selection, lacks, usable):
    where = str(make_siglip(tmp_path / "siglip", **change)) if change else bases[tower]
    message = (
        rf"selection: '{selection}' needs {lacks}, which this encoder \({tower}_vision_model\) lacks; with it work: "
    )
    with pytest.raises(UserError, match=message + usable + "$"):
        build_model("llava", bases["llama"], where, skip_vision={**SKIP, "selection": selection})


def test_no_selection_is_no_complaint(bases):
    """LLaVA-HD retains its whole overview: the default selection is not read, and SigLIP will do."""
    build_model("llava_hd", bases["llama"], bases["siglip"], skip_vision={})
    with pytest.raises(UserError, match="needs a CLS token"):
        build_model("llava_hd", bases["llama"], bases["siglip"], skip_vision={"num_retained": 7, "num_skipped": 5})


def test_cls_patch_needs_a_cls_token(bases):
    with pytest.raises(UserError, match="siglip_vision_model has no CLS token for 'cls_patch'; use 'patch'"):
        build_model("llava", bases["llama"], bases["siglip"], mm_vision_select_feature="cls_patch")


def test_another_kind_of_image_processor_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    with pytest.raises(UserError, match="'ViTImageProcessor'; known: CLIPImageProcessor, SiglipImageProcessor"):
        load_image_processor(str(tmp_path))
