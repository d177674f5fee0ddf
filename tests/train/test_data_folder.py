"""Training from what `llava-sv data mix` and `data index` write; and an order of samples that outlives a stop."""

import json
import types

import numpy as np
import pytest

from llava_sv.cluster.agree import describe
from llava_sv.data.index import IndexWriter, open_records
from llava_sv.train import preflight
from llava_sv.train import train as entry
from tests.train.runs import losses, run


@pytest.fixture
def folder(world, tmp_path):
    """The records of sft.json as `data mix` writes them."""
    made = tmp_path / "mixture"
    with IndexWriter(made / "index.arrow") as writer:
        for record in open_records(world.data / "sft.json"):
            writer.add(record, "colours")
    (made / "manifest.json").write_text(json.dumps({"kind": "mixture"}))
    return made


def test_the_same_losses_from_json_an_index_and_a_folder(world, folder, tmp_path):
    found = []
    for name, data in {"json": world.data / "sft.json", "arrow": folder / "index.arrow", "folder": folder}.items():
        run(world.flags("sft", tmp_path / name, "--data_path", str(data), "--max_steps", "3"))
        found.append(losses(tmp_path / name))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 3


def test_a_folder_is_compared_between_nodes_by_its_index(folder):
    shared = preflight.shared_inputs({"data_path": str(folder)})
    assert shared["data"] == folder / "index.arrow"
    assert describe(shared["data"]).startswith(f"{(folder / 'index.arrow').stat().st_size:,} bytes, sha256 ")
    (folder / "index.arrow").unlink()
    assert describe(preflight.shared_inputs({"data_path": str(folder)})["data"]) != describe(shared["data"])
    (folder / "manifest.json").write_text(json.dumps({"kind": "shards"}))
    assert preflight.shared_inputs({"data_path": str(folder)})["data"] == folder / "manifest.json"


@pytest.mark.parametrize("flag", ["--data_path", "--eval_data_path"])
def test_what_a_folder_must_hold(world, folder, tmp_path, flag):
    flags = [*world.flags("sft", tmp_path), flag, str(folder)]
    assert preflight.missing_inputs(flags) == []
    (folder / "index.arrow").unlink()
    (problem,) = preflight.missing_inputs(flags)
    wanted = "give a LLaVA JSON or JSONL file, an .arrow index, or a folder that llava-sv data mix or data shard wrote"
    assert problem.endswith(wanted)
    if flag == "--data_path":
        assert f"folder {folder} holds no index.arrow and no shards" in problem
    (folder / "manifest.json").write_text(json.dumps({"kind": "shards"}))
    assert preflight.missing_inputs(flags) == []


def test_a_damaged_index_ends_in_one_line(world, folder, tmp_path, capsys):
    path = folder / "index.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    assert entry.main(world.flags("sft", tmp_path / "out", "--data_path", str(folder))) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1:] == [f"error: {path}: is cut off; delete it, then copy it again or make it again from its source"]


def test_a_run_that_goes_on_takes_the_lengths_it_began_with(tmp_path, monkeypatch):
    """What is counted between a stop and the resumption would change the order, and with it what was seen."""
    asked = []

    def lengths(tokens, exact):
        asked.append(list(exact))
        return np.ones(3, int)

    dataset = types.SimpleNamespace(
        counted=lambda tokens: ["sizes", "text"], lengths=lengths, modalities=lambda: np.ones(3, bool)
    )
    config = types.SimpleNamespace(visual_tokens_per_image=None)
    settings: dict = {}
    entry.sample_lengths(dataset, config, settings, None)
    assert settings == {"exact_lengths": ["sizes", "text"]}
    for kept, expected in [({}, []), ({"exact_lengths": ["text"]}, ["text"])]:
        monkeypatch.setattr("llava_sv.train.checkpoint.read_marker", lambda folder, kept=kept: {"settings": kept})
        entry.sample_lengths(dataset, config, settings, tmp_path)
        assert settings == {"exact_lengths": expected}
    monkeypatch.setattr("llava_sv.cluster.agree.same_everywhere", lambda lengths: lengths)
    monkeypatch.setattr("llava_sv.cluster.agree.gather", lambda mine: [mine, ["text"]])
    entry.sample_lengths(dataset, config, settings, None)
    assert settings == {"exact_lengths": ["text"]}, "what another node has not counted is not used here"
    assert asked == [["sizes", "text"], [], ["text"], ["text"]]
