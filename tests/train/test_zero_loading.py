"""Checkpoints loaded under ZeRO-3 by two processes: the weights of plain loading, its errors, and no whole copy."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from llava_sv.errors import UserError
from llava_sv.model.builders import build_model
from llava_sv.model.checkpoint_io import load_strictly
from llava_sv.model.loading import load_whole, read_config
from llava_sv.model.multimodal_encoder.pretrained import load_vision_tower
from llava_sv.model.partitioned_loading import chunks, names_only
from tests.model.checkpoints import make_clip, make_llm, make_siglip
from tests.train import loading_worker, runs

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5, "num_attention_heads": 8}


def make_llama(folder, seed=0, **changed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changed}))


def sharded(folder):
    make_llama(folder).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def old_format(folder):
    model = make_llama(folder, seed=1)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def tied(folder):
    make_llama(folder, seed=2, tie_word_embeddings=True).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def experts(folder):
    """Its file has each expert's tensors apart, the model all in one: the library's own loading fuses them."""
    torch.manual_seed(3)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3)
    MixtralForCausalLM(config).save_pretrained(folder)
    assert any(".experts.2." in key for key in load_file(folder / "model.safetensors"))


def whole(folder):
    bases = str(make_llm(folder / "llm")), str(make_clip(folder / "clip"))
    for part in build_model("llava", *bases, skip_vision={"num_retained": 4, "num_skipped": 5}, conv_template="plain"):
        part.save_pretrained(folder)


LOADED = {
    "sharded": ("decoder", sharded, "float32"),
    "bfloat16": ("decoder", sharded, "bfloat16"),
    "bin": ("decoder", old_format, "float32"),
    "tied": ("decoder", tied, "float32"),
    "clip": ("tower", make_clip, "float32"),
    "siglip with its pooling head": ("tower", make_siglip, "float32"),
    "experts": ("experts", experts, "float32"),
    "a whole llava": ("whole", whole, "float32"),
}


def damaged(change):
    def make(folder):
        make_llama(folder).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return make


def cut_short(folder):
    make_llama(folder).save_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


REFUSED = {
    "lacks 1 key(s): model.norm.weight": damaged(lambda w: w.pop("model.norm.weight")),
    "has, unlike its config, 1 key(s): extra": damaged(lambda w: w.update(extra=torch.ones(2))),
    "in another shape than its config says": damaged(lambda w: w.update({"lm_head.weight": torch.ones(9, 32)})),
    "weights cannot be read": cut_short,
}


def plainly(what, path, dtype):
    """The same load without DeepSpeed."""
    if what == "tower":
        return load_vision_tower(path, loading_worker.TOWER, dtype=dtype).vision_tower["vision_model"]
    if what == "whole":
        return load_whole(path, read_config(path), dtype=dtype)
    return load_strictly(MixtralForCausalLM if what == "experts" else LlamaForCausalLM, path, dtype=dtype)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each process, by the case's name; and what plain loading says of each damaged checkpoint."""
    folder = tmp_path_factory.mktemp("loading")
    cases, said = [], {}
    for number, (name, (what, make, dtype)) in enumerate(LOADED.items()):
        path = folder / str(number)
        path.mkdir()
        make(path)
        model = plainly(what, str(path), getattr(torch, dtype))
        expected = folder / f"{number}.pt"
        torch.save(dict(model.named_parameters(remove_duplicate=False)), expected)
        cases.append({"name": name, "what": what, "path": str(path), "dtype": dtype, "expected": str(expected)})
    for number, (name, make) in enumerate(REFUSED.items()):
        path = folder / f"bad{number}"
        make(path)
        with pytest.raises(UserError) as caught:
            plainly("decoder", str(path), torch.float32)
        said[name] = str(caught.value)
        cases.append({"name": name, "what": "decoder", "path": str(path)})
    large = folder / "large"
    make_llama(large, **LARGE).save_pretrained(large)
    cases.append({"name": "memory", "what": "memory", "path": str(large)})
    plan = folder / "cases.json"
    plan.write_text(json.dumps({"folder": str(folder), "cases": cases}))
    # blocks of 1 MB go back to the system as soon as they are free: what is in memory is what is in use
    done = runs.launch(
        [*runs.TWO, loading_worker.__file__, plan], 240, DS_ACCELERATOR="cpu", MALLOC_MMAP_THRESHOLD_="1000000"
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], said, large


@pytest.mark.parametrize("name", LOADED)
def test_the_weights_of_plain_loading(results, name):
    for result in results[0]:
        assert "said" not in result[name], result[name]
        assert result[name]["worst"] == 0.0
        assert result[name]["left"] == []
        assert result[name]["dtypes"] == [f"torch.{LOADED[name][2]}"]
    with_head = results[0][0]["sharded"]["tensors"]
    assert results[0][0]["tied"]["tensors"] == with_head - 1, "tied weights are one tensor"


@pytest.mark.parametrize("name", REFUSED)
def test_the_errors_of_plain_loading_in_every_process(results, name):
    by_rank, said, _ = results
    assert name in said[name]
    for result in by_rank:
        first = result[name]["said"].split("(")[0] if "cannot be read" in name else result[name]["said"]
        assert said[name].startswith(first)


def test_no_process_holds_a_whole_copy(results):
    """Each holds its half, and for a while what is being handed round: 16 MiB, read, gathered and sent."""
    by_rank, _, large = results
    whole = (large / "model.safetensors").stat().st_size / 2**20
    assert whole > 200
    for result in by_rank:
        assert result["memory"]["ours"] < whole / 2 + 100, result["memory"]
    library = max(result["memory"]["library"] for result in by_rank)
    assert library > whole, "what is measured is not what it seems: the library's own loading maps the whole file"


def test_chunks_are_bounded_and_keep_their_order():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 2}
    assert list(chunks(sizes, 7)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(chunks({}, 7)) == []


def test_which_tables_of_old_names_are_followed():
    from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

    renamed = WeightRenaming("old.", "new.")
    assert names_only(None)
    assert names_only([renamed])
    assert not names_only([renamed, WeightConverter("*.w1", "w", operations=[Concatenate(dim=0)])])
