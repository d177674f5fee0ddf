"""Tensors read one by one and written shard by shard: the same bytes as transformers writes, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_sv.errors import UserError
from llava_sv.release.weights import in_shards, open_weights, write_weights


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A random LLaMA that transformers saved in several shards."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, head_dim=16
        )
    )
    folder = tmp_path_factory.mktemp("stock")
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder, model


def names(folder):
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name)


def test_the_source_s_shards_come_out_byte_for_byte(stock, tmp_path):
    folder, _ = stock
    assert len(names(folder)) > 3
    write_weights(tmp_path, open_weights(folder), shard_bytes=None)
    assert names(tmp_path) == names(folder)
    for name in names(folder):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_shards_of_a_chosen_size_and_type(stock, tmp_path):
    folder, model = stock
    entries = open_weights(folder)
    assert {entry.name: entry.shape for entry in entries} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    files = write_weights(tmp_path, entries, shard_bytes=10_000, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * value.numel() for value in model.state_dict().values())
    found = {name: value for file in files for name, value in load_file(tmp_path / file).items()}
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in model.state_dict().items())
    assert all(len(shard) == 1 or sum(e.bytes for e in shard) <= 10_000 for shard in in_shards(entries, 10_000))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_become_safetensors(stock, tmp_path, zipped):
    """Both of torch's file forms, tensors that share memory among them."""
    state = dict(stock[1].state_dict())
    state["twin"], state["part"] = state["lm_head.weight"], state["lm_head.weight"][:2]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    write_weights(out, open_weights(source))
    found = load_file(out / "model.safetensors")
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


class Malicious:
    """Unpickled by Python itself, it would make a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        import os

        return os.mkdir, (self.place,)


def test_a_pickle_runs_no_code(tmp_path):
    torch.save({"a": Malicious(str(tmp_path / "made"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: cannot be read"):
        open_weights(tmp_path)
    assert not (tmp_path / "made").exists()


def index(folder, mapping):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


def test_what_is_absent_or_broken_is_named(tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        open_weights(tmp_path)
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    with pytest.raises(UserError, match=r"lacks model-2.safetensors, which model.safetensors.index.json names"):
        open_weights(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(UserError, match=r"a is in model-1.safetensors and in model-2.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"model-2.safetensors: cannot be read"):
        open_weights(tmp_path)
    index(tmp_path, {"a": "../model-1.safetensors"})
    with pytest.raises(UserError, match="which is not a file beside it"):
        open_weights(tmp_path)
    index(tmp_path, None)
    with pytest.raises(UserError, match="has no weight_map"):
        open_weights(tmp_path)
