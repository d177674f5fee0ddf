"""From sources as their owners publish them to a training: mix, check, stats, shard, and the same losses from the
mixture and from its shards. What a newcomer does with docs/Mixtures.md, Data.md and Shards.md, in one go."""

from __future__ import annotations

import json

import pytest
import torch

from llava_sv import cli
from llava_sv.data.index import open_records
from llava_sv.data.recipes import read_recipe
from tests.data.trees import make_tree
from tests.train.runs import losses, run
from tests.train.tiny import World

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(data root, the mixture's folder, how many records the sample of each source holds)."""
    root = tmp_path_factory.mktemp("walk")
    counts = make_tree(root, [entry.source.name for entry in read_recipe("sv-1m").entries])
    assert cli.main(["data", "mix", "sv-1m", "--root", str(root), "--workers", "2"]) == 0
    return root, root / "mixtures" / "sv-1m", counts


def report(folder, *argv):
    """What a command writes with --json."""
    assert cli.main([*map(str, argv), "--json", str(folder / "report.json")]) == 0
    return json.loads((folder / "report.json").read_text())


def test_the_mixture_stands_check_and_is_counted_by_task_group(walk, tmp_path):
    root, folder, counts = walk
    checked = report(tmp_path, "data", "check", folder, "--image-folder", root, "--html", tmp_path / "report.html")
    records = open_records(folder)
    assert checked["good_records"] == len(records)
    assert checked["problems"] == 0
    counted = report(tmp_path, "data", "stats", folder, "--plots", tmp_path / "plots")
    sources = {name: each["records"] for group in counted["groups"].values() for name, each in group["sources"].items()}
    assert sum(sources.values()) == counted["records"] == len(records)
    assert sources == counts
    groups = {entry.source.name: entry.source.group for entry in read_recipe("sv-1m").entries}
    assert {group: set(found["sources"]) for group, found in counted["groups"].items()} == {
        group: {name for name in sources if groups[name] == group} for group in set(groups.values())
    }
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"groups.png", "sources.png", "records.png"}


def test_the_mixture_and_its_shards_train_alike(walk, tmp_path):
    root, folder, _ = walk
    world = World(tmp_path / "world", count=1)
    forms = {"mixture": folder}
    for kind in ("tar", "parquet"):
        forms[kind] = tmp_path / kind
        packed = ("--output", forms[kind], "--format", kind, "--samples-per-shard", "20", "--workers", "2", "--verify")
        made = report(tmp_path, "data", "shard", folder, "--image-folder", root, *packed)
        assert made["samples"] == len(open_records(folder))
        assert made["left_out"] == 0
    told = {}
    for kind, data in forms.items():
        flags = world.flags("skip", tmp_path / f"out-{kind}", "--data_path", str(data), "--image_folder", str(root))
        run([*flags, "--max_steps", "2"])
        told[kind] = losses(tmp_path / f"out-{kind}")
    assert len(told["mixture"]) == 2
    assert told["tar"] == told["parquet"] == told["mixture"]
