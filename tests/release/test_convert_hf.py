"""transformers' LLaVA and LLaVA-NeXT to this project's layout and back: logits, greedy text and files are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sv import cli
from tests.release.hf_checkpoints import SIDE, ask_hf, ask_sv, make_hf, picture, small_files

PROMPT = "USER: <image>\nWhat colour is it? ASSISTANT:"


def convert(source, to, out, *words):
    return cli.main(["convert", str(source), "--to", to, "--out", str(out), *map(str, words)])


def same_answers(hf, sv, prompt=PROMPT, image=None):
    image = image or picture()
    theirs, their_text = ask_hf(hf, prompt, image)
    ours, our_text = ask_sv(sv, prompt, image)
    rows = min(theirs.shape[1], ours.shape[1])
    assert theirs.shape[0] == ours.shape[0]
    torch.testing.assert_close(theirs[:, :rows], ours[:, :rows], rtol=0, atol=1e-5)
    assert their_text == our_text
    return their_text


KINDS = {
    "llava": {},
    "shards": {"shards": "20KB"},
    "tied": {"tied": True, "text": "qwen2"},
    "full": {"vision_feature_select_strategy": "full"},
    "pads": {"pads": True, "text": "mistral"},
    "siglip": {"vision": "siglip", "text": "qwen3", "shards": "30KB"},
    "siglip-pads": {"vision": "siglip", "pads": True, "vision_feature_layer": -1},
    "layer": {"vision_feature_layer": 2, "text_fields": {"rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                                              "rope_theta": 5000.0}}},
    "next": {"is_next": True, "shards": "40KB"},
    "next-siglip": {"is_next": True, "vision": "siglip", "text": "qwen2", "tied": True},
    "next-mistral": {"is_next": True, "text": "mistral"},
}  # fmt: skip


FAST = ("shards", "tied", "pads", "siglip", "next")
"""The others take the same paths once more."""


ALL = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind", ALL)
def test_there_and_back(tmp_path, capsys, kind):
    hf = make_hf(tmp_path / "hf", **KINDS[kind])
    assert convert(hf, "sv", tmp_path / "sv") == 0
    said = capsys.readouterr().out
    assert "logits are at most" in said
    assert "greedy texts are equal" in said
    assert "make pixels" not in said, "the two processors make the same pixels"
    same_answers(hf, tmp_path / "sv")
    same_answers(hf, tmp_path / "sv", image=picture(30, 100))
    assert convert(tmp_path / "sv", "hf", tmp_path / "back") == 0
    assert small_files(tmp_path / "back") == small_files(hf)
    weights = [name for name in small_files(hf) if name.endswith(".safetensors")]
    assert len(weights) == (1 if "shards" not in KINDS[kind] else len(weights)) > 0
    if "shards" in KINDS[kind]:
        assert len(weights) > 2


def as_published(folder, style, old):
    """The folder as other releases of transformers left it: names of weights in `style`; old: 4.3x's small files."""
    for path in sorted(folder.glob("*.safetensors")):
        values = {}
        for name, value in load_file(path).items():
            for prefix, other in style.items():
                if name.startswith(prefix):
                    name = other + name.removeprefix(prefix)
                    break
            values[name] = value
        save_file(values, path, metadata={"format": "pt"})
    if not old:
        return
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    sparse = {"_name_or_path": "lmsys/vicuna-7b-v1.5", "torch_dtype": "float32", "rope_theta": 10000.0}
    for name in ("rope_parameters", "pretraining_tp", "attention_bias", "mlp_bias", "use_cache", "initializer_range"):
        text.pop(name)
    for name in ("initializer_factor", "layer_norm_eps", "hidden_act", "num_channels"):
        vision.pop(name)
    config |= {"text_config": {**text, **sparse}, "ignore_index": -100, "torch_dtype": "float32", "pad_token_id": 5}
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    processor = json.loads((folder / "processor_config.json").read_text())
    images = processor.pop("image_processor")
    images |= {"size": SIDE, "crop_size": SIDE, "processor_class": "LlavaProcessor"}
    del images["image_processor_type"]
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    jinja = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": jinja}))
    (folder / "chat_template.jinja").unlink()


STYLES = {
    "4.3x": ({"vision_tower.": "vision_tower.vision_model."}, True),
    "in memory": (
        {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        False,
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_names_and_files_of_other_releases(tmp_path, style):
    hf = make_hf(tmp_path / "hf")
    as_published(hf, *STYLES[style])
    assert convert(hf, "sv", tmp_path / "sv") == 0
    same_answers(hf, tmp_path / "sv")
    assert json.loads((tmp_path / "sv" / "config.json").read_text())["conv_template"] == "vicuna_v1"
    assert convert(tmp_path / "sv", "hf", tmp_path / "back") == 0
    assert small_files(tmp_path / "back") == small_files(hf)


def test_pickled_weights_and_buffers_of_old_releases(tmp_path, capsys):
    hf = make_hf(tmp_path / "hf")
    values = load_file(hf / "model.safetensors")
    values["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    values["vision_tower.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(values, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    assert convert(hf, "sv", tmp_path / "sv", "--no-check") == 0
    assert "weights: 2 buffer(s) left out that models make by themselves" in capsys.readouterr().out
    (hf / "pytorch_model.bin").unlink()
    for name in [name for name in values if name.endswith(("inv_freq", "position_ids"))]:
        del values[name]
    save_file(values, hf / "model.safetensors", metadata={"format": "pt"})
    same_answers(hf, tmp_path / "sv")
    assert convert(tmp_path / "sv", "hf", tmp_path / "back", "--no-check") == 0
    assert small_files(tmp_path / "back") == small_files(hf)


def test_pixels_that_cannot_agree_are_said(tmp_path, capsys):
    """Tiles that transformers' processor enlarges and crops once more."""
    hf = make_hf(tmp_path / "hf", is_next=True, processor={"size": {"shortest_edge": 40}})
    assert convert(hf, "sv", tmp_path / "sv", "--json", tmp_path / "done.json") == 0
    out = capsys.readouterr().out
    assert "note: pictures: LlavaNextImageProcessor and image_aspect_ratio anyres make pixels" in out
    check = json.loads((tmp_path / "done.json").read_text())["check"]
    assert check["same_pixels"] is False
    assert check["logits"] <= check["tolerance"], "the models agree on the same pixels"
