"""LLaVA's layout to a plan and back: the same tensors, the same config.json, the same logits; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sv.errors import UserError
from llava_sv.model.builders import build_model
from llava_sv.release import from_llava, to_llava
from llava_sv.release.check_plan import check_plan
from llava_sv.release.weights import open_weights
from tests.model import liuhaotian
from tests.model.checkpoints import make_llm
from tests.model.liuhaotian import V15, V16, V16_MISTRAL
from tests.release.plans import assert_equal, logits, write_sv

TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return liuhaotian.make_encoder(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture
def v15(clip, tmp_path):
    liuhaotian.make_v15(tmp_path / "llava-v1.5", clip, model_type="llava_llama")
    return tmp_path / "llava-v1.5"


def tensors(folder):
    return {entry.name: entry.load() for entry in open_weights(folder)}


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def written(plan, folder, **options):
    folder.mkdir()
    to_llava.write(plan, folder, **options)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["v15", "v16", "mistral"])
def test_there_and_back(clip, tmp_path, kind):
    """To this project's layout, a folder of its own, and from that folder back."""
    source = tmp_path / "llava"
    if kind == "v15":
        weights = liuhaotian.make_v15(source, clip, model_type="llava_llama")
    else:
        weights = liuhaotian.make_v16(source, clip, V16 if kind == "v16" else V16_MISTRAL)
    plan = from_llava.read(source)
    ours = write_sv(plan, tmp_path / "ours")
    (ours / "tokenizer.json").unlink()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, ours)
    shutil.copy(source / "generation_config.json", ours)
    assert_equal(logits(ours), logits(source))
    again = from_llava.read(ours)
    back = written(dataclasses.replace(again, layout="sv"), tmp_path / "back")
    assert equal(tensors(back), weights)
    assert config_of(back) == config_of(source)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert_equal(logits(back), logits(source))
    assert not list(back.glob("*.bin"))


def test_the_same_plan_gives_the_same_bytes(v15, tmp_path):
    one, two = (written(from_llava.read(v15), tmp_path / name, shard_bytes=20000) for name in ("llava-1", "llava-2"))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert "model.safetensors.index.json" in files
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_what_the_user_is_told(v15, clip, tmp_path):
    plan = from_llava.read(v15)
    assert plan.notes[0] == f"vision encoder: 55 tensors of {clip}, which the checkpoint names"
    assert plan.notes[1].startswith("prompts: conv_template v1 by the language model")
    written(plan, tmp_path / "llava-out")
    assert f"left out, it is {clip} unchanged" in plan.notes[2]
    assert plan.notes[3].startswith(f"mm_vision_tower is a folder of this machine ({clip}); before the result")
    assert "keep 'llava' in it" in plan.notes[4]
    liuhaotian.make_v16(tmp_path / "v16", clip)
    assert from_llava.read(tmp_path / "v16").notes[0] == "vision encoder: 55 tensors of the checkpoint's own"


def test_the_encoder_in_the_precision_of_the_rest(clip, tmp_path):
    """LLaVA runs it in the language model's, and the published encoder is float32."""
    folder = tmp_path / "llava"
    liuhaotian.make_v15(folder, clip, torch_dtype="float16")
    for file in folder.glob("*.bin"):
        torch.save({k: v.half() for k, v in torch.load(file, weights_only=True).items()}, file)
    plan = from_llava.read(folder)
    assert {entry.dtype for entry in plan.entries} == {torch.float16}
    own = load_file(clip / "model.safetensors")["vision_model.post_layernorm.weight"]
    (entry,) = (entry for entry in plan.entries if entry.name.endswith("post_layernorm.weight"))
    assert torch.equal(entry.load(), own.half())
    plan.config["unfreeze_mm_vision_tower"] = None
    assert not any(name.startswith(TOWER) for name in tensors(written(plan, tmp_path / "out"))), "it is the same still"


def test_a_trained_encoder_is_written_whatever_config_says(v15, tmp_path):
    """A fine-tuned one whose config.json is left over from the frozen one."""
    plan = from_llava.read(v15)
    ours = write_sv(plan, tmp_path / "ours")
    weights = load_file(ours / "model.safetensors")
    changed = f"{TOWER}encoder.layers.0.mlp.fc1.weight"
    weights[changed] = weights[changed] + 1
    save_file(weights, ours / "model.safetensors", {"format": "pt"})
    again = from_llava.read(ours)
    back = written(again, tmp_path / "back")
    assert config_of(back)["unfreeze_mm_vision_tower"] is True
    assert torch.equal(tensors(back)[changed], weights[changed])
    assert any("written, since its weights are not those of" in note for note in again.notes)
    assert_equal(logits(back), logits(ours))


@pytest.mark.parametrize(("said", "left_out"), [(None, False), (False, True), (True, False)])
def test_an_encoder_that_cannot_be_compared(v15, tmp_path, said, left_out):
    """Only a config.json that says it was frozen lets it be left out."""
    plan = from_llava.read(v15)
    plan.config |= {"mm_vision_tower": "openai/no-such-clip", "unfreeze_mm_vision_tower": said}
    if said is None:
        del plan.config["unfreeze_mm_vision_tower"]
    back = written(plan, tmp_path / "back")
    assert left_out == (not any(name.startswith(TOWER) for name in tensors(back)))
    assert config_of(back)["unfreeze_mm_vision_tower"] is not left_out


def test_where_the_encoder_lies(v15, clip, tmp_path):
    """The name in config.json stays the hub's."""
    config = config_of(v15) | {"mm_vision_tower": "openai/no-such-clip"}
    (v15 / "config.json").write_text(json.dumps(config))
    plan = from_llava.read(v15, vision_tower=str(clip))
    assert plan.config["mm_vision_tower"] == "openai/no-such-clip"
    back = written(plan, tmp_path / "back", vision_tower=str(clip))
    assert config_of(back) == config
    ours = write_sv(plan, tmp_path / "ours")
    assert_equal(logits(ours), logits(v15, vision_tower=str(clip)))


def test_a_projector_on_its_base(clip, tmp_path):
    """The base's sizes and constants win over what pretraining's config.json remembers."""
    base = liuhaotian.make_base(tmp_path / "vicuna")
    liuhaotian.make_projector(tmp_path / "projector", clip)
    with pytest.raises(UserError, match="holds a projector alone; name its language model with --base"):
        from_llava.read(tmp_path / "projector")
    plan = from_llava.read(tmp_path / "projector", base=str(base))
    assert_equal(logits(write_sv(plan, tmp_path / "ours")), logits(tmp_path / "projector", model_base=str(base)))
    assert_equal(logits(written(plan, tmp_path / "llava")), logits(tmp_path / "ours"))
    with pytest.raises(UserError, match="no language model's"):
        from_llava.read(tmp_path / "projector", base=str(clip))


@pytest.mark.parametrize("whole", [False, True], ids=["on-a-language-model", "on-a-llava"])
def test_adapters_are_added_first(v15, clip, tmp_path, whole):
    base = v15 if whole else liuhaotian.make_base(tmp_path / "vicuna")
    liuhaotian.make_lora(tmp_path / "lora", clip, str(base))
    plan = from_llava.read(tmp_path / "lora")
    assert_equal(logits(write_sv(plan, tmp_path / "ours")), logits(tmp_path / "lora"))
    assert_equal(logits(written(plan, tmp_path / "llava")), logits(tmp_path / "ours"))
    assert plan.notes == [
        f"adapters of {tmp_path / 'lora'} added to their base {base}",
        f"vision encoder: left out, it is {clip} unchanged, which LLaVA's code loads by that name",
        f"mm_vision_tower is a folder of this machine ({clip}); before the result is passed on, write the encoder's "
        "published name there",
        "LLaVA's code goes by a folder's name: keep 'llava' in it, and no 'lora'",
    ]


def test_buffers_of_older_releases_are_left_out(clip, tmp_path):
    """Of the decoder and of the encoder, whose index has another type."""
    weights = liuhaotian.make_v16(tmp_path / "llava", clip)
    for file in (tmp_path / "llava").glob("*.safetensors*"):
        file.unlink()
    buffers = {f"{TOWER}embeddings.position_ids": torch.arange(17)[None]}
    buffers["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file({**weights, **buffers}, tmp_path / "llava" / "model.safetensors", {"format": "pt"})
    plan = from_llava.read(tmp_path / "llava")
    assert not {entry.name for entry in plan.entries} & set(buffers)
    assert_equal(logits(write_sv(plan, tmp_path / "ours")), logits(tmp_path / "llava"))


def test_what_a_whole_checkpoint_needs_not(v15, tmp_path):
    with pytest.raises(UserError, match="is a whole model, which needs no base; drop --base"):
        from_llava.read(v15, base=str(tmp_path))


DAMAGE = {
    "lacks 1 weight(s): model.norm.weight": lambda w: w.pop("model.norm.weight"),
    "has, unlike its config, 1 weight(s): model.layers.0.extra": lambda w: w.update(
        {"model.layers.0.extra": torch.ones(2)}
    ),
    "in another shape than its config says 1 weight(s): model.mm_projector.0.bias": lambda w: w.update(
        {"model.mm_projector.0.bias": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_weights_that_do_not_fit_are_named_before_anything_is_read(v15, said):
    for file in v15.glob("*.bin"):
        file.unlink()
    (v15 / "pytorch_model.bin.index.json").unlink()
    weights = liuhaotian.language_weights(V15) | liuhaotian.projector_weights()
    DAMAGE[said](weights)
    torch.save(weights, v15 / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        check_plan(from_llava.read(v15))
    assert said in str(caught.value)
    assert str(v15) in str(caught.value)


REFUSED = [
    ("llava", {"num_retained": 4, "num_skipped": 5}, {}, "llama", "--drop-skip makes it dense"),
    ("cos", None, {"mm_projector_type": "cos_80"}, "llama", "is of family cos (Chain-of-Sight)"),
    (
        "llava_hd",
        None,
        {"image_aspect_ratio": "pad"},
        "llama",
        "cuts images into tiles in a way (image_aspect_ratio 'pad')",
    ),
    ("llava", None, {}, "qwen3", "LLaVA's code has no llava_qwen3 (llama, mistral, qwen2)"),
]


@pytest.mark.parametrize(("family", "skip", "settings", "llm", "said"), REFUSED)
def test_what_llava_has_no_place_for(clip, tmp_path, family, skip, settings, llm, said):
    parts = build_model(family, str(make_llm(tmp_path / "llm", kind=llm)), str(clip), skip_vision=skip, **settings)
    for part in parts:
        part.save_pretrained(tmp_path / "ours")
    plan = from_llava.read(tmp_path / "ours")
    with pytest.raises(UserError) as caught:
        to_llava.write(plan, tmp_path)
    (line,) = str(caught.value).splitlines()
    assert said in line
    assert str(tmp_path / "ours") in line


def test_qwen2_goes_by_llava_s_name_for_it(clip, tmp_path):
    """Tied weights too: what is not on disk is not asked for."""
    parts = build_model("llava", str(make_llm(tmp_path / "llm", kind="qwen2")), str(clip), conv_template="chatml")
    for part in parts:
        part.save_pretrained(tmp_path / "ours")
    plan = from_llava.read(tmp_path / "ours")
    back = written(plan, tmp_path / "llava")
    assert "llava_qwen: read by the code of LLaVA-NeXT, not by that of LLaVA-1.5" in plan.notes
    assert (config_of(back)["model_type"], config_of(back)["architectures"]) == ("llava_qwen", ["LlavaQwenForCausalLM"])
    assert_equal(logits(back), logits(tmp_path / "ours"))


def test_a_config_of_this_transformers_in_the_terms_of_llava_s(clip, tmp_path):
    """rope_theta, rope_scaling and torch_dtype, which the versions that LLaVA runs on read."""
    base = make_llm(tmp_path / "llm")
    values = json.loads((base / "config.json").read_text())
    values["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    (base / "config.json").write_text(json.dumps(values))
    for part in build_model("llava", str(base), str(clip), conv_template="v1"):
        part.save_pretrained(tmp_path / "ours")
    config = config_of(written(from_llava.read(tmp_path / "ours"), tmp_path / "llava", dtype=torch.float16))
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == "float16"
    assert {tensor.dtype for tensor in tensors(tmp_path / "llava").values()} == {torch.float16}
    ours_alone = {
        "mm_family",
        "vision_config",
        "skip_vision",
        "hd_max_tiles",
        "conv_template",
        "rope_parameters",
        "dtype",
    }
    assert not ours_alone & set(config)
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token", "tune_mm_mlp_adapter"):
        assert config[name] is False
    assert config["use_mm_proj"] is True
