"""`llava-sv analyze attention` from flags to files, its sums by hand, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava_sv import cli
from llava_sv.analysis.attention import check_level, mapped_layers
from llava_sv.analysis.attention_rows import GROUPS
from llava_sv.analysis.attention_tally import Tally
from llava_sv.errors import UserError
from tests.parity.tiny import tiny_config


def run(checkpoint, pictures, out, *more):
    flags = ["--model-path", str(checkpoint), "--image-folder", str(pictures), "--output", str(out), "--device", "cpu"]
    return cli.main(["analyze", "attention", *flags, *more])


def error_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


# -- sums --------------------------------------------------------------------------------------------------------------


def rows_of(*groups, heads=4, layers=3):
    """[1, L, H, G + 1] with the same row everywhere: text, retained, fine, summary, skipped, generated, first."""
    return torch.tensor(groups).expand(1, layers, heads, len(GROUPS) + 1).clone()


def seen_of(*groups, layers=3):
    return torch.tensor(groups, dtype=torch.float32).expand(1, layers, len(GROUPS) + 1).clone()


def test_sums_by_hand():
    """Two pictures: one of two generated tokens, the skipped ones gone before the second; one of one token."""
    tally = Tally(tiny_config(), max_new_tokens=4)
    first = torch.cat([rows_of(0.5, 0.2, 0, 0.1, 0.2, 0.0, 0.3), rows_of(0.4, 0.3, 0, 0.1, 0.0, 0.2, 0.2)])
    seen = torch.cat([seen_of(10, 4, 0, 2, 4, 0, 1), seen_of(10, 4, 0, 2, 0, 1, 1)])
    first[1, 2, 0] += torch.tensor([-0.4, 0.4, 0, 0, 0, 0, 0])  # one head of one layer looks elsewhere
    tally.add("a.png", first, seen)
    tally.add("b.png", rows_of(0.8, 0.1, 0, 0.05, 0.05, 0.0, 0.6), seen_of(10, 4, 0, 2, 4, 0, 1))
    assert tally.groups == ["text", "retained", "summary", "skipped", "generated"]
    np.testing.assert_allclose(tally.share()[0], [0.625, 0.175, 0.075, 0.075, 0.05], rtol=1e-6)
    np.testing.assert_allclose(tally.share()[2], [0.6, 0.2, 0.075, 0.075, 0.05], rtol=1e-6)
    np.testing.assert_allclose(tally.share().sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(tally.spread()[0], [0.175, 0.075, 0.025, 0.025, 0.05], rtol=1e-5)
    # text 0.045 of 10 and 0.08; skipped of rows that see them, 0.05 and 0.0125; generated of the one row that has any
    np.testing.assert_allclose(tally.per_token()[0], [0.0625, 0.04375, 0.0375, 0.03125, 0.2], rtol=1e-6)
    even = [(0.05 * 20 + 0.04 * 17) / 2, (0.05 * 20 + 0.075 * 17) / 2, (0.05 * 20 + 0.05 * 17) / 2, 0.05 * 20]
    other = [0.08 * 20, 0.025 * 20, 0.025 * 20, 0.0125 * 20]
    np.testing.assert_allclose(tally.over_even()[0][:4], np.add(even, other) / 2, rtol=1e-6)
    np.testing.assert_allclose(tally.over_even()[0][4], 0.2 * 17, rtol=1e-6)
    np.testing.assert_allclose(tally.first_token(), (0.25 + 0.6) / 2, rtol=1e-6)
    np.testing.assert_allclose(tally.visual_over_text()[0], 0.325 / 0.625, rtol=1e-6)
    assert tally.by_token().shape == (2, 3, 5)
    np.testing.assert_allclose(tally.by_token()[0, 0], [0.65, 0.15, 0.075, 0.125, 0], rtol=1e-6)
    np.testing.assert_allclose(tally.by_token()[1, 0], [0.4, 0.3, 0.1, 0, 0.2], rtol=1e-6)
    heads = tally.arrays()["heads"]
    np.testing.assert_allclose(heads[2, 0], [(0.25 + 0.8) / 2, (0.45 + 0.1) / 2, 0.075, 0.075, 0.05], rtol=1e-6)
    numbers = tally.numbers()
    assert numbers["prompt_tokens"] == {"text": 10, "retained": 4, "summary": 2, "skipped": 4}
    assert numbers["generated_tokens"] == 1.5
    assert [row["answers"] for row in numbers["per_generated_token"]] == [2, 1]
    assert tally.in_words().startswith("attention of generated tokens, mean of all layers: text 61.7%, retained 18.3%")


# -- the command -------------------------------------------------------------------------------------------------------


def test_files_agree_with_each_other(skip_checkpoint, pictures, tmp_path, capsys):
    assert run(skip_checkpoint, pictures, tmp_path, "--max-new-tokens", "6", "--maps", "2", "--num-images", "3") == 0
    names = ["attention.json", "attention.npz", "attention.png", "attention_maps.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    numbers = json.loads((tmp_path / "attention.json").read_text())
    arrays = np.load(tmp_path / "attention.npz")
    assert numbers["images"] == 3
    assert numbers["skip_kv"] == "none"
    assert "note" not in numbers
    assert numbers["groups"] == ["text", "retained", "summary", "skipped", "generated"]
    assert numbers["prompt_tokens"]["skipped"] == 5
    assert arrays["names"].tolist() == ["a.png", "b.JPG", "c.webp"]
    assert arrays["share"].shape == (3, 2, 5)
    assert arrays["heads"].shape == (2, 4, 5)
    for key in ("share", "heads", "by_token"):
        np.testing.assert_allclose(arrays[key].sum(-1), 1.0, atol=1e-5)
    for layer in numbers["per_layer"]:
        assert sum(layer["share"].values()) == pytest.approx(1, abs=1e-6)
    assert [row["token"] for row in numbers["per_generated_token"]] == list(range(1, len(arrays["answers"]) + 1))
    assert [one["name"] for one in numbers["maps"]] == ["a.png", "b.JPG"]
    for i in range(2):  # a map's mass is its groups' share
        assert arrays[f"map_{i}_picture"].shape == (2, 4, 4)
        on_patches = arrays["share"][i][:, [1, 3]].sum(-1)
        np.testing.assert_allclose(arrays[f"map_{i}_picture"].sum((1, 2)), on_patches, atol=1e-5)
        np.testing.assert_allclose(numbers["maps"][i]["share_on_patches"]["picture"], on_patches, atol=1e-5)
    for name in names[2:]:
        with Image.open(tmp_path / name) as image:
            assert image.width > 500
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert "attention of generated tokens, mean of all layers: text" in capsys.readouterr().out


def test_a_level_is_said_to_empty_what_it_drops(skip_checkpoint, pictures, tmp_path, capsys):
    more = ("--skip-kv", "skipped", "--max-new-tokens", "5", "--maps", "0", "--num-images", "2", "--dtype", "bf16")
    assert run(skip_checkpoint, pictures, tmp_path, *more) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz", ".png"]
    numbers = json.loads((tmp_path / "attention.json").read_text())
    first, *others = [row["share"] for row in numbers["per_generated_token"]]
    assert others
    assert first["skipped"] > 0
    assert {share["skipped"] for share in others} == {0.0}
    assert numbers["note"].startswith("skip KV-cache skipped: skipped tokens leave the cache after the first generated")
    assert numbers["note"] in capsys.readouterr().out
    np.testing.assert_allclose(np.load(tmp_path / "attention.npz")["share"].sum(-1), 1.0, atol=1e-5)


def test_maps_of_one_token(skip_checkpoint, pictures, tmp_path):
    more = ("--max-new-tokens", "4", "--maps", "1", "--num-images", "2")
    for token in (1, 2, 3, 4):
        assert run(skip_checkpoint, pictures, tmp_path / str(token), *more, "--map-token", str(token)) == 0
    assert run(skip_checkpoint, pictures, tmp_path / "all", *more) == 0
    maps = [np.load(tmp_path / str(token) / "attention.npz")["map_0_picture"] for token in (1, 2, 3, 4)]
    assert np.abs(maps[0] - maps[1]).max() > 1e-4
    np.testing.assert_allclose(sum(maps) / 4, np.load(tmp_path / "all" / "attention.npz")["map_0_picture"], atol=1e-6)


def test_no_answer_is_as_long_as_the_token_asked_for(skip_checkpoint, pictures, tmp_path, capsys, monkeypatch):
    from llava_sv.analysis import attention

    one = attention.generate
    monkeypatch.setattr(attention, "generate", lambda *args, **kwargs: one(*args, **{**kwargs, "max_new_tokens": 1}))
    more = ("--max-new-tokens", "4", "--map-token", "2", "--num-images", "1")
    assert run(skip_checkpoint, pictures, tmp_path, *more) == 0
    assert "no maps: no answer has 2 tokens" in capsys.readouterr().out
    assert not (tmp_path / "attention_maps.png").exists()


def test_a_dense_checkpoint(dense_checkpoint, pictures, tmp_path, capsys):
    assert run(dense_checkpoint, pictures, tmp_path, "--max-new-tokens", "1", "--num-images", "1", "--layers", "1") == 0
    numbers = json.loads((tmp_path / "attention.json").read_text())
    assert numbers["groups"] == ["text", "retained", "generated"]
    assert numbers["all_layers"]["share"]["generated"] == 0
    assert numbers["per_layer"][0]["share_per_token"]["generated"] is None
    assert run(dense_checkpoint, pictures, tmp_path / "other", "--skip-kv", "skipped") == 2
    assert error_of(capsys) == [
        "error: --skip-kv skipped: this checkpoint is dense and skips no tokens; leave --skip-kv out"
    ]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--max-new-tokens", "0"), "--max-new-tokens 0: must be 1 or more"),
        (("--maps", "-1"), "--maps -1: must be 0 (none) to 64"),
        (("--maps", "65"), "--maps 65: must be 0 (none) to 64"),
        (("--map-token", "0"), "--map-token 0: must be 1 to --max-new-tokens, 32"),
        (("--map-token", "9", "--max-new-tokens", "8"), "--map-token 9: must be 1 to --max-new-tokens, 8"),
        (("--skip-kv", "all"), "--skip-kv all: unknown level; known: none, skipped, fine+skipped"),
        (("--layers", "0,x"), "--layers 0,x: cannot read '0,x'; write 'all', '8-31' or '0,4,8-15'"),
        (("--layers", "0,2"), "--layers 0,2: no layer 2; this model has layers 0 to 1"),
        (("--layers", "-1"), "--layers -1: cannot read '-1'; write 'all', '8-31' or '0,4,8-15'"),
        (
            ("--skip-kv", "fine+skipped"),
            "skip_kv 'fine+skipped' drops a middle scale, and family 'llava' has none; use 'skipped' or 'none' (only "
            "'cos' has a middle scale)",
        ),
    ],
)
def test_bad_input_is_one_line(flags, line, skip_checkpoint, pictures, tmp_path, capsys):
    assert run(skip_checkpoint, pictures, tmp_path / "out", *flags) == 2
    assert error_of(capsys) == [f"error: {line}"]
    assert not list(tmp_path.rglob("attention*"))


@pytest.mark.parametrize("name", ["attention.npz", "attention_maps.png"])
def test_what_is_there_is_kept(name, skip_checkpoint, pictures, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    assert run(skip_checkpoint, pictures, tmp_path, "--num-images", "1", "--max-new-tokens", "1") == 2
    (line,) = error_of(capsys)
    assert line.endswith(f"{tmp_path / name} exists; name another folder, or --overwrite")
    assert (tmp_path / name).read_text() == "mine"
    more = ("--num-images", "1", "--max-new-tokens", "1", "--overwrite")
    assert run(skip_checkpoint, pictures, tmp_path, *more) == 0
    assert (tmp_path / name).read_bytes() != b"mine"


def test_layers_with_maps():
    assert mapped_layers(None, 32) == [0, 10, 21, 31]
    assert mapped_layers(None, 2) == [0, 1]
    assert mapped_layers(None, 1) == [0]
    assert mapped_layers("31,0,0", 32) == [0, 31]
    assert mapped_layers("1-3,0", 4) == mapped_layers("all", 4) == [0, 1, 2, 3]


def test_levels_of_a_checkpoint():
    check_level(tiny_config(None), "none")
    check_level(tiny_config(), "skipped")
    with pytest.raises(UserError, match="dense"):
        check_level(tiny_config(None), "skipped")
