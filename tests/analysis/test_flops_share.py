"""`analyze flops-share` against sums written out by hand, and against `llava-sv flops`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llava_sv import cli
from llava_sv.bench.checkpoint import read_checkpoint
from tests.analysis.families import save_family


def run(folder, *flags):
    assert cli.main(["analyze", "flops-share", "--output", str(folder), *flags]) == 0
    return json.loads((folder / "flops-share.json").read_text()), np.load(folder / "flops-share.npz")


def test_llama_3_8b_by_hand(tmp_path):
    report, arrays = run(tmp_path, "--text-tokens", "200,50")
    width, ffn, layers, heads_width, kv_width, vocabulary = 4096, 14336, 32, 4096, 1024, 128256
    assert arrays["text_tokens"].tolist() == [200, 50]
    assert arrays["shares"].sum(axis=-1) == pytest.approx(1.0)
    for line, text in enumerate((200, 50)):
        for at in (0, 60, 199):
            visual = int(arrays["visual_tokens"][at])
            total = visual + text
            a_row = 2 * width * heads_width * 2 + 2 * width * kv_width * 2
            parts = [
                layers * visual * 3 * 2 * width * ffn,
                layers * visual * a_row,
                layers * visual * total * 2 * 2 * heads_width,
                layers * text * 3 * 2 * width * ffn,
                layers * text * a_row,
                layers * text * total * 2 * 2 * heads_width,
                2 * width * vocabulary,
            ]
            assert arrays["shares"][line, at] == pytest.approx(np.array(parts) / sum(parts))
    first = report["settings"][0]
    assert (first["name"], first["dense_tokens"], first["retained"], first["skipped"]) == (
        "llava 100_156",
        576,
        100,
        156,
    )
    assert first["skip"]["visual_ffn"] == layers * (100 + 2) * 6 * width * ffn
    assert first["skip"]["visual_projections"] == layers * (256 + 2) * a_row
    assert first["visual_ffn_share_dense"] == pytest.approx(first["dense"]["visual_ffn"] / sum(first["dense"].values()))
    assert [one["name"] for one in report["settings"] if one["skip"] is None] == [
        "cos cos_336", "cos cos_80_448", "cos cos_80"
    ]  # fmt: skip
    assert (tmp_path / "flops-share.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("family", "switches"),
    [("llava", {"skip_layers": [1]}), ("llava", {"last_visual_ffn": True}), ("llava_hd", {}), ("cos", {})],
)
def test_a_checkpoint_as_llava_sv_flops_counts_it(family, switches, tmp_path):
    checkpoint = save_family(tmp_path / "model", family, **switches)
    report, arrays = run(tmp_path / "out", "--model-path", str(checkpoint), "--text-tokens", "30")
    file = tmp_path / "flops.json"
    assert cli.main(["flops", "--model-path", str(checkpoint), "--text-tokens", "30", "--json", str(file)]) == 0
    counted = json.loads(file.read_text())
    (mark,) = report["settings"]
    assert mark["dense_tokens"] == read_checkpoint(str(checkpoint)).dense_tokens_per_image()
    assert mark["ratio"] == pytest.approx(counted["exact_llm_ratio"])
    for side in ("dense", "skip"):
        assert sum(mark[side].values()) == pytest.approx(counted[side]["prefill"]["llm"])
        ffn = mark[side]["visual_ffn"] + mark[side]["text_ffn"]
        assert ffn == pytest.approx(counted[side]["prefill"]["llm_ffn"])
    assert arrays["visual_tokens"][-1] == round(1.1 * mark["dense_tokens"])


def test_a_dense_checkpoint_has_no_skipping_side(tmp_path, dense_checkpoint):
    report, arrays = run(tmp_path, "--model-path", str(dense_checkpoint), "--max-tokens", "40")
    assert [(one["dense_tokens"], one["skip"], one["ratio"]) for one in report["settings"]] == [(16, None, None)]
    assert arrays["visual_tokens"].tolist() == list(range(1, 41))


def test_curves_that_end_before_any_setting(tmp_path):
    report, arrays = run(tmp_path, "--max-tokens", "50")
    assert arrays["visual_tokens"][-1] == 50
    assert min(one["dense_tokens"] for one in report["settings"]) > 50


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--text-tokens", "many"], "--text-tokens: cannot read 'many'; write whole numbers of 1 or more, such as 200"),
        (["--text-tokens", "5,0"], "--text-tokens: cannot read '5,0'"),
        (["--text-tokens", "\u00b2"], "--text-tokens: cannot read '\u00b2'"),
        (["--max-tokens", "1"], "--max-tokens 1: must be 2 or more"),
        (["--llm-config", "llama-9"], "--llm-config: unknown language model 'llama-9'; known: llama-3-8b, "),
        (["--llm-config", "llama-3-8b", "--model-path", "x"], "--llm-config and --model-path: give one of them"),
        (["--model-path", "absent"], "--model-path absent: no readable config.json there"),
    ],
)
def test_what_is_wrong_is_one_line(flags, said, tmp_path, capsys):
    assert cli.main(["analyze", "flops-share", "--output", str(tmp_path), *flags]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {said}")
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())
