"""transformers' LLaVA and LLaVA-NeXT to this project's layout and back: logits, greedy text and files are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sv import cli
from tests.release.hf_checkpoints import ask_hf, ask_sv, make_hf, picture, rewrite, small_files

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


@pytest.mark.parametrize("kind", KINDS)
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
