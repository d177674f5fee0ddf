"""`llava-sv flops`: the paper's table in one call, answers, switches, memory, and what happens to files that exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sv import cli
from llava_sv.bench.exact import Tokens, llm_flops
from llava_sv.bench.presets import FAMILIES, LLMS


def reported(tmp_path, *argv: str) -> dict:
    target = tmp_path / "table.json"
    assert cli.main(["flops", *argv, "--json", str(target), "--overwrite"]) == 0
    return json.loads(target.read_text())


@pytest.mark.parametrize("argv", [["--table"], []], ids=["asked for", "nothing else asked"])
def test_section_6_in_one_call(argv, tmp_path, capsys):
    report = reported(tmp_path, *argv)
    assert [round(100 * row["paper_ratio"], 1) for row in report["settings"]] == [24.7, 60.5, 24.7, 26.0]
    assert [row["printed"] for row in report["settings"]] == [25, 60, 50, 25]
    assert report["hd_baseline"] == pytest.approx(1485, abs=1)
    out = capsys.readouterr().out
    for row in report["settings"]:
        one = reported(tmp_path, "--family", row["family"], "--preset", row["preset"])
        for key in ("paper_ratio", "exact_ratio", "exact_llm_ratio", "train_ratio", "end_to_end_ratio", "kv_ratio"):
            assert row[key] == one[key]
        assert f"| {row['label']} | {row['paper_ratio']:.1%} | {row['printed']}% |" in out


def test_table_1_s_figures_and_shares(tmp_path):
    """5.64B (70%), 1.34B (17%), 0.5B (6%): the paper cuts 6.5% off; and 10.5 N C^2 a layer for the FFN."""
    report = reported(tmp_path, "--table")
    table = report["table_1"]
    assert [round(table[part]["parameters"] / 1e9, 2) for part in ("ffn", "attention", "embedding")] == [
        5.64,
        1.34,
        0.53,
    ]
    assert [round(100 * table[part]["share"], 1) for part in ("ffn", "attention", "embedding")] == [70.2, 16.7, 6.5]
    layers, tokens, width = 32, 576, 4096
    assert table["ffn"]["complexity"] == "10.5 L N C^2"
    assert table["ffn"]["multiply_adds"] == 10.5 * layers * tokens * width**2
    assert table["attention"]["complexity"] == "2 L N^2 C + 2.5 L N C^2"
    assert table["attention"]["multiply_adds"] == layers * (2 * tokens**2 * width + 2.5 * tokens * width**2)
    assert table["ffn"]["flops_share"] + table["attention"]["flops_share"] == pytest.approx(1)
    # what the two parts say of all visual tokens is what the exact count says of the decoder without its head
    exact = llm_flops(LLMS["llama-3-8b"], Tokens(0, tokens), 0)
    assert 2 * table["ffn"]["multiply_adds"] == exact["llm_ffn"]
    assert 2 * table["attention"]["multiply_adds"] == exact["llm_projections"] + exact["llm_attention"]


def test_the_documented_table_is_what_the_command_prints(capsys):
    assert cli.main(["flops", "--table"]) == 0
    page = (Path(__file__).parents[2] / "docs/Benchmarks.md").read_text(encoding="utf-8").splitlines()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 6 + 5
    assert [line for line in printed if line not in page] == []


def test_what_is_known_is_listed(capsys):
    assert cli.main(["flops", "--list"]) == 0
    out = capsys.readouterr().out
    known = [*LLMS, *(preset for presets in FAMILIES.values() for preset in presets)]
    assert [name for name in known if f"| {name} |" not in out] == []


def test_a_report_that_exists_is_kept_unless_it_may_be_replaced(tmp_path, capsys):
    target = tmp_path / "flops.json"
    target.write_text("mine")
    assert cli.main(["flops", "--family", "cos", "--json", str(target)]) == 2
    assert capsys.readouterr().err == f"error: --json {target}: exists; give another name, or --overwrite\n"
    assert target.read_text() == "mine"
    assert cli.main(["flops", "--family", "cos", "--json", str(target), "--overwrite"]) == 0
    assert json.loads(target.read_text())["family"] == "cos"


def test_an_answer_by_hand(tmp_path):
    """LLaMA-3-8B, bf16: 2 x 32 layers x 8 KV heads of 128 x 2 bytes a token, 776 tokens dense and 302 skipping; a new
    token costs two FLOPs a weight it meets, and 4 x 4096 a layer and position it attends to."""
    report = reported(tmp_path, "--family", "llava", "--new-tokens", "3", "--batch", "2")
    a_token = 2 * 2 * 32 * 8 * 128 * 2
    rows = {"dense": report["dense"]["answer"]["none"], **report["skip"]["answer"]}
    assert {name: row["kv_tokens"] for name, row in rows.items()} == {"dense": 776, "none": 458, "skipped": 302}
    assert {name: row["kv_bytes"] / a_token for name, row in rows.items()} == {
        "dense": 776,
        "none": 458,
        "skipped": 302,
    }
    assert report["kv_ratio"] == 302 / 776
    assert report["dense"]["kv_bytes_prefill"] == 776 * a_token
    assert report["skip"]["kv_bytes_prefill"] == 458 * a_token
    weights = 32 * (2 * 4096 * 128 * (32 + 8) + 3 * 4096 * 14336) + 128256 * 4096
    steps = [2 * weights + 32 * 4 * 4096 * (302 + 1 + step) for step in range(2)]
    row = rows["skipped"]
    assert row["decode_first"] == steps[0]
    assert row["decode_per_token"] == sum(steps) / 2
    assert row["end_to_end"] == report["skip"]["prefill"]["total"] + sum(steps)
    assert row["kv_bytes_at_end"] == 304 * a_token
    assert reported(tmp_path, "--family", "llava", "--new-tokens", "1")["decode_ratio"] is None


def test_precision_scales_bytes_and_no_flops(tmp_path):
    narrow, wide = (reported(tmp_path, "--family", "cos", "--dtype", dtype) for dtype in ("fp16", "fp32"))
    assert wide["skip"]["prefill"] == narrow["skip"]["prefill"]
    for key in ("weights", "kv_cache", "total"):
        assert wide["skip"]["memory"][key] == 2 * narrow["skip"]["memory"][key]


def test_switches_of_a_preset(tmp_path):
    base = reported(tmp_path, "--family", "llava")
    whole = reported(tmp_path, "--family", "llava", "--no-skip-ffn")
    half = reported(tmp_path, "--family", "llava", "--skip-layers", "16-31")
    ffn = {name: report["skip"]["prefill"]["llm_ffn"] for name, report in (("b", base), ("w", whole), ("h", half))}
    assert ffn["h"] == (ffn["b"] + ffn["w"]) / 2
    assert half["skipping_layers"] == 16
    everything = reported(tmp_path, "--family", "llava", "--no-merge")
    assert (everything["num_skipped"], everything["skip"]["prefill"]["merge"]) == (476, 0)
    none = reported(tmp_path, "--family", "llava", "--no-former-summary", "--no-latter-summary")
    assert (none["skip"]["visual_tokens"], none["skip"]["prefill"]["summaries"]) == (256, 0)
    last = reported(tmp_path, "--family", "llava", "--last-visual-ffn")
    assert last["skip"]["ffn_rows"] == base["skip"]["ffn_rows"] + 1
    assert last["skip"]["answer"]["skipped"]["kv_tokens"] == base["skip"]["answer"]["skipped"]["kv_tokens"] + 1
    middle = reported(tmp_path, "--family", "cos", "--skip-kv", "fine+skipped")
    assert middle["skip"]["kv_level"] == "fine+skipped"
    assert middle["kv_ratio"] == (200 + 16 + 2) / 1496


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_memory_stands_beside_the_arithmetic(family, tmp_path):
    """Weights are the arithmetic's; a prefill holds at least its cache; skipping takes less of both."""
    sizes = "hidden_size=1024,intermediate_size=3584,num_hidden_layers=4,num_attention_heads=8,num_key_value_heads=2"
    argv = ["--family", family, "--llm-config", f"{sizes},vocab_size=1000", "--batch", "2", "--memory"]
    report = reported(tmp_path, *argv)
    traced = report["memory"]
    for side in ("dense", "skip"):
        prefill = traced["prefill"][side]
        assert prefill["weights"] == pytest.approx(report[side]["memory"]["weights"], rel=1e-3)
        assert prefill["activations and cache"] > report[side]["kv_bytes_prefill"]
        assert prefill["total"] == prefill["weights"] + prefill["activations and cache"]
    key = "activations, at their most"
    assert traced["training"]["skip"][key] < traced["training"]["dense"][key]
