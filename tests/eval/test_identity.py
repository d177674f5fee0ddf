"""A checkpoint's fingerprint: what leaves it as it is, what changes it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sv.errors import UserError
from llava_sv.eval import identity as room
from llava_sv.eval.identity import identity
from llava_sv.release.weights import open_weights, write_weights


@pytest.fixture
def copy(skip_checkpoint, tmp_path):
    return shutil.copytree(skip_checkpoint, tmp_path / "another-name")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    values = load_file(path)
    change(values)
    save_file(values, path, metadata={"format": "pt"})


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=1))


def test_a_copy_is_the_same(skip_checkpoint, copy):
    assert identity(copy) == identity(skip_checkpoint)
    assert {len(value) for value in identity(copy).values()} == {64}


def test_shards_and_order_do_not_count(skip_checkpoint, copy):
    entries = open_weights(skip_checkpoint)[::-1]
    (copy / "model.safetensors").unlink()
    assert len(write_weights(copy, entries, shard_bytes=20_000)) > 2
    assert identity(copy) == identity(skip_checkpoint)


def test_storing_in_bfloat16_does_not_count(skip_checkpoint, copy):
    write_weights(copy, open_weights(skip_checkpoint), dtype=torch.bfloat16)
    assert load_file(copy / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert identity(copy) == identity(skip_checkpoint)


def test_paths_versions_and_types_in_the_config_do_not_count(skip_checkpoint, copy):
    configure(copy, mm_vision_tower="elsewhere", transformers_version="5.0.0", dtype="bfloat16", cos_windows=None)
    assert identity(copy) == identity(skip_checkpoint)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_step_of_training_counts(skip_checkpoint, copy, name):
    rewrite(copy, lambda values: values[name].mul_(1.02))
    before, after = identity(skip_checkpoint), identity(copy)
    assert before["weights"] != after["weights"]
    assert before["settings"] == after["settings"]


def test_names_and_shapes_count(skip_checkpoint, copy):
    rewrite(copy, lambda values: values.update(other=values.pop("lm_head.weight")))
    renamed = identity(copy)["weights"]
    rewrite(copy, lambda values: values.update(other=values["other"].reshape(-1, 16)))
    assert len({identity(skip_checkpoint)["weights"], renamed, identity(copy)["weights"]}) == 3


def test_large_tensors_are_sampled_by_rows(tmp_path, monkeypatch):
    """First and last row are among those that count; most are not read."""
    monkeypatch.setattr(room, "WHOLE", 8)
    (tmp_path / "config.json").write_text("{}")

    def of(change=None):
        values = torch.arange(400.0).reshape(100, 4)
        if change is not None:
            values[change] += 8
        save_file({"w": values}, tmp_path / "model.safetensors")
        return identity(tmp_path)["weights"]

    plain = of()
    changed = [row for row in range(100) if of(row) != plain]
    assert len(changed) == room.ROWS
    assert {0, 99} <= set(changed)


def test_another_budget_is_another_model_on_the_same_weights(skip_checkpoint, copy):
    skip = json.loads((copy / "config.json").read_text())["skip_vision"]
    configure(copy, skip_vision={**skip, "num_skipped": 6})
    before, after = identity(skip_checkpoint), identity(copy)
    assert before["weights"] == after["weights"]
    assert before["settings"] != after["settings"]
    configure(copy, skip_vision={"num_retained": skip["num_retained"], "num_skipped": skip["num_skipped"]})
    assert identity(copy) == before  # defaults that are not written out


def test_adapters_and_projectors_are_known_by_themselves(skip_checkpoint, tmp_path):
    shutil.copy(skip_checkpoint / "config.json", tmp_path)
    assert identity(tmp_path) is None
    save_file({"p": torch.ones(2)}, tmp_path / "mm_projector.safetensors")
    projector = identity(tmp_path)["weights"]
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    adapters = identity(tmp_path)["weights"]
    save_file({"b": torch.ones(2)}, tmp_path / "non_lora_trainables.safetensors")
    assert len({projector, adapters, identity(tmp_path)["weights"]}) == 3


def test_what_is_no_folder_has_none():
    assert identity("organisation/name") is None


def test_broken_files_are_named(copy):
    (copy / "config.json").write_text("{\n oops}")
    with pytest.raises(UserError, match=r"config.json, line 2, column 2: not JSON"):
        identity(copy)
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"weights .*model.safetensors: cannot be read"):
        identity(copy)
