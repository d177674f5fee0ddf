"""Ways between all three layouts, what changes on the way (types, shards, skipping, tokens), and what stays behind."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionModel

from llava_sv import cli
from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.conversation import CONV_TEMPLATES, render
from llava_sv.files import sha256_of
from llava_sv.release.chat_templates import jinja_for, template_of
from tests.model.liuhaotian import make_encoder, make_v16
from tests.release.hf_checkpoints import (
    SIDE,
    VISION,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    make_hf,
    rewrite,
    small_files,
)
from tests.release.test_convert_hf import convert, same_answers
from tests.train.tiny import make_tokenizer


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("hf") / "hf", shards="40KB")


@pytest.fixture(scope="module")
def sv(hf, tmp_path_factory):
    """The same in this project's layout, as training leaves it: nothing kept of the other, no image token."""
    folder = tmp_path_factory.mktemp("sv") / "sv"
    assert convert(hf, "sv", folder, "--no-check", "--conv-template", "llama_3") == 0
    for path in sorted((folder / "conversion").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "conversion").rmdir()
    (folder / "chat_template.jinja").unlink()
    make_tokenizer(folder)
    return folder


def tensors(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def differing(first, second):
    one, two = small_files(first), small_files(second)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def test_a_missing_image_token_is_added_and_taken_away(sv, tmp_path, capsys):
    vocabulary = json.loads((sv / "config.json").read_text())["vocab_size"]
    assert "<image>" not in AutoTokenizer.from_pretrained(sv).get_vocab()
    assert convert(sv, "hf", tmp_path / "hf") == 0
    out = capsys.readouterr().out
    assert "tokens: <image> added as" in out
    assert "make pixels" not in out
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == vocabulary, "the embedding has a row for it"
    same_answers(tmp_path / "hf", sv)
    assert convert(tmp_path / "hf", "sv", tmp_path / "back") == 0
    assert differing(sv, tmp_path / "back") == []


def test_the_vocabulary_grows_when_no_row_is_free(sv, tmp_path, capsys):
    """An embedding with exactly one row a token, as most language models have."""
    tight = tmp_path / "tight"
    shutil.copytree(sv, tight)
    size = len(AutoTokenizer.from_pretrained(sv))
    rewrite(tight, "config.json", vocab_size=size)
    weights = tensors(tight)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:size].clone()
    for path in tight.glob("model*"):
        path.unlink()
    save_file(weights, tight / "model.safetensors", metadata={"format": "pt"})
    assert convert(tight, "hf", tmp_path / "hf") == 0
    assert f"the vocabulary grew from {size} to 320 rows" in capsys.readouterr().out
    old, new = tensors(tight), tensors(tmp_path / "hf")
    for ours, theirs in (
        ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ):
        assert torch.equal(new[theirs][:size], old[ours])
        assert torch.equal(new[theirs][size:], old[ours].double().mean(0).float().expand(320 - size, -1))
    same_answers(tmp_path / "hf", tight)
    assert convert(tmp_path / "hf", "sv", tmp_path / "back") == 0
    assert differing(tight, tmp_path / "back") == []


def test_an_added_token_stays_where_the_tokenizer_has_changed(sv, tmp_path):
    assert convert(sv, "hf", tmp_path / "hf", "--no-check") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(tmp_path / "hf")
    assert convert(tmp_path / "hf", "sv", tmp_path / "back") == 0
    assert {"<image>", "<mine>"} <= set(AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab())


def test_what_was_edited_is_not_put_back(hf, tmp_path):
    assert convert(hf, "sv", tmp_path / "sv", "--no-check") == 0
    rewrite(tmp_path / "sv", "config.json", rms_norm_eps=0.5, image_aspect_ratio="pad")
    rewrite(tmp_path / "sv", "generation_config.json", max_new_tokens=5)
    assert convert(tmp_path / "sv", "hf", tmp_path / "back") == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["text_config"]["rms_norm_eps"] == 0.5
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["max_new_tokens"] == 5
    kind = json.loads((tmp_path / "back" / "processor_config.json").read_text())["image_processor"]
    assert kind["image_processor_type"] == "LlavaImageProcessor"
    assert kind["do_pad"] is True
    same = [name for name in small_files(hf) if name not in differing(hf, tmp_path / "back")]
    assert "tokenizer.json" in same
    assert "tokenizer_config.json" in same
    assert "model.safetensors.index.json" in same
    same_answers(tmp_path / "back", tmp_path / "sv")


def test_what_was_added_is_not_put_back(tmp_path):
    """Generation settings where there were none, and a new field inside of another, reach the way home."""
    source = make_hf(tmp_path / "hf")
    (source / "generation_config.json").unlink()
    sv, back = tmp_path / "sv", tmp_path / "back"
    assert convert(source, "sv", sv, "--no-check") == 0
    assert not (sv / "generation_config.json").exists()
    (sv / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.25}))
    rope = json.loads((sv / "config.json").read_text())["rope_parameters"]
    rewrite(sv, "config.json", rope_parameters={**rope, "partial_rotary_factor": 0.5})
    assert convert(sv, "hf", back, "--no-check") == 0
    assert json.loads((back / "generation_config.json").read_text())["temperature"] == 0.25
    text = json.loads((back / "config.json").read_text())["text_config"]
    assert text["rope_parameters"]["partial_rotary_factor"] == 0.5


def test_a_conversation_template_stands_where_a_layout_has_a_place_for_it(sv, tmp_path):
    """The template of an edited chat template reaches config.json; one that a flag names reaches the chat template."""
    assert convert(sv, "hf", tmp_path / "hf", "--no-check") == 0
    chatml = jinja_for(CONV_TEMPLATES["chatml"], AutoTokenizer.from_pretrained(sv))
    (tmp_path / "hf" / "chat_template.jinja").write_text(chatml)
    assert convert(tmp_path / "hf", "sv", tmp_path / "back", "--no-check") == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["conv_template"] == "chatml"
    words = ("--no-check", "--conv-template", "mistral_instruct")
    assert convert(tmp_path / "back", "hf", tmp_path / "again", *words) == 0
    jinja = (tmp_path / "again" / "chat_template.jinja").read_text()
    assert jinja == jinja_for(CONV_TEMPLATES["mistral_instruct"], AutoTokenizer.from_pretrained(sv))


def test_types_and_shards(hf, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert convert(hf, "sv", tmp_path / "sv", "--dtype", "bfloat16", "--shard-size", "30KB", "--json", report) == 0
    done = json.loads(report.read_text())
    assert done["check"]["logits"] <= done["check"]["tolerance"]
    assert done["dtype"] == "bfloat16"
    assert set(done["files"]) == {str(p) for p in small_files(tmp_path / "sv")}
    assert {value.dtype for value in tensors(tmp_path / "sv").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "sv" / "config.json").read_text())["dtype"] == "bfloat16"
    files = list((tmp_path / "sv").glob("model-*.safetensors"))
    assert len(files) > 3
    assert convert(tmp_path / "sv", "sv", tmp_path / "again", "--shard-size", "1GB", "--dtype", "float32") == 0
    once = tensors(tmp_path / "again")
    assert all(torch.equal(once[name], value.float()) for name, value in tensors(tmp_path / "sv").items())
    assert [path.name for path in (tmp_path / "again").glob("*.safetensors")] == ["model.safetensors"]


def test_a_dense_checkpoint_is_made_to_skip_and_dense_again(hf, tmp_path, capsys):
    words = ("--sv_num_retained", 4, "--sv_num_skipped", 5, "--sv_summary_norm", "layernorm")
    assert convert(hf, "sv", tmp_path / "skip", *words) == 0
    assert "a model that skips is not the dense one; it was loaded and answers" in capsys.readouterr().out
    block = json.loads((tmp_path / "skip" / "config.json").read_text())["skip_vision"]
    assert (block["num_retained"], block["num_skipped"], block["summary_norm"]) == (4, 5, "layernorm")
    dense = tensors(hf)
    assert len(tensors(tmp_path / "skip")) > len(dense)
    assert convert(tmp_path / "skip", "hf", tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert "transformers' own classes cannot; pass --drop-skip" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()
    assert convert(tmp_path / "skip", "hf", tmp_path / "dense", "--drop-skip") == 0
    out = capsys.readouterr().out
    assert "skipping dropped" in out
    assert "logits are at most 0 apart" in out
    back = tensors(tmp_path / "dense")
    assert all(torch.equal(back[name], value) for name, value in dense.items())


def test_tiles_made_to_skip_lose_their_row_ends_and_get_new_ones(tmp_path, capsys):
    hf = make_hf(tmp_path / "hf", is_next=True)
    words = ("--sv_num_retained", 4, "--sv_num_skipped", 5)
    assert convert(hf, "sv", tmp_path / "skip", *words) == 0
    assert "image_newline dropped" in capsys.readouterr().out
    assert convert(tmp_path / "skip", "hf", tmp_path / "dense", "--drop-skip") == 0
    out = capsys.readouterr().out
    assert "image_newline is new: train it" in out
    assert "the source skips and the result does not; it was loaded and answers" in out
    old, new = tensors(hf), tensors(tmp_path / "dense")
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["image_newline"]


def test_what_a_type_changed_is_made_anew_and_the_rest_put_back(hf, tmp_path):
    assert convert(hf, "sv", tmp_path / "sv", "--dtype", "float16", "--no-check") == 0
    assert convert(tmp_path / "sv", "hf", tmp_path / "back", "--no-check") == 0
    changed = [name for name in differing(hf, tmp_path / "back") if not name.startswith(("model", "conversion/"))]
    assert changed == ["config.json"]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float16"
    assert convert(tmp_path / "back", "sv", tmp_path / "again", "--no-check") == 0
    again = differing(tmp_path / "sv", tmp_path / "again")
    assert [name for name in again if not name.startswith("conversion/")] == []


def test_llava_s_layout_from_and_to_transformers(tmp_path, capsys):
    clip = make_encoder(tmp_path / "clip")
    make_v16(tmp_path / "llava", clip)
    assert convert(tmp_path / "llava", "hf", tmp_path / "hf") == 0
    out = capsys.readouterr().out
    assert "logits are at most 0 apart" in out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llava_next"
    assert convert(tmp_path / "hf", "llava", tmp_path / "back") == 0
    assert differing(tmp_path / "llava", tmp_path / "back") in ([], ["preprocessor_config.json"])


def test_transformers_to_llava_s_layout_and_back(hf, tmp_path):
    torch.manual_seed(3)
    encoder = tmp_path / "encoder"
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(encoder)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(encoder)
    assert convert(hf, "llava", tmp_path / "llava", "--vision-tower", encoder) == 0
    assert "mm_family" not in json.loads((tmp_path / "llava" / "config.json").read_text())
    assert convert(tmp_path / "llava", "sv", tmp_path / "sv") == 0
    same_answers(hf, tmp_path / "sv")
    assert convert(tmp_path / "sv", "hf", tmp_path / "back") == 0
    assert differing(hf, tmp_path / "back") == [], "what was kept travels through both layouts"


@pytest.mark.parametrize("name", [name for name in CONV_TEMPLATES if name != "plain"])
def test_chat_templates_are_written_and_recognised(tmp_path, name):
    tokenizer = make_tokenizer(tmp_path)
    template = CONV_TEMPLATES[name]
    jinja = jinja_for(template, tokenizer)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
    ]
    for system in (None, "Be brief."):
        first = [] if system is None else [{"role": "system", "content": system}]
        said = tokenizer.apply_chat_template(
            [*first, *messages], chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
        assert said == render(template, turns, add_generation_prompt=True, system=system).text
    found, note = template_of(jinja, tokenizer)
    assert CONV_TEMPLATES[found] is template
    assert note == ""


def test_a_converted_folder_has_a_processor(hf, tmp_path):
    """Of this project, by config.json alone; the chat template of the other layout beside it is not taken for its."""
    assert convert(hf, "sv", tmp_path / "sv", "--no-check", "--conv-template", "vicuna_v1") == 0
    (tmp_path / "sv" / "chat_template.jinja").write_text("another one")
    processor = AutoProcessor.from_pretrained(tmp_path / "sv")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    said = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    turns = [{"from": "human", "value": "<image>\nWhat?"}]
    assert said == render(CONV_TEMPLATES["vicuna_v1"], turns, add_generation_prompt=True).text
    ids = processor(text=said, images=Image.new("RGB", (40, 30)))["input_ids"][0]
    assert ids.tolist().count(IMAGE_TOKEN_INDEX) == 1


def test_a_source_in_use_stays_as_it_was(hf, tmp_path):
    before = {name: sha256_of(hf / name) for name in small_files(hf)}
    assert convert(hf, "sv", tmp_path / "sv", "--no-check") == 0
    assert {name: sha256_of(hf / name) for name in small_files(hf)} == before


def test_command_line_help_names_training_s_flags(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    out = capsys.readouterr().out
    for flag in ("--to", "--drop-skip", "--no-check", "--shard-size", "--sv_num_retained", "--sv_skip_kv"):
        assert flag in out
