"""FLOPs: the paper's table, hand-computed counts, and torch's own counter on the real modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig

from llava_sv import cli
from llava_sv.bench.exact import Tokens, llm_flops
from llava_sv.bench.flops import exact_flops, paper_flops, paper_ratio, train_flops
from llava_sv.bench.presets import FAMILIES, LLMS, LlmSize


@pytest.mark.parametrize(
    ("retained", "skipped", "dense", "percent"),
    [(100, 156, 576, 24.7), (256, 320, 576, 60.5), (576, 576, 2880, 24.7), (272, 256, 1296, 26.0)],
)
def test_the_papers_table(retained, skipped, dense, percent):
    assert round(100 * paper_ratio(retained, skipped, dense), 1) == percent


def test_papers_formula_by_hand():
    # 4*3*2^2 + 2*3^2*2 + 3*1*2*5
    assert paper_flops(3, 1, hidden=2, ffn=5) == 48 + 36 + 30


def test_papers_hd_figure_is_a_smaller_baseline():
    """Table 2's 50% for HD implies about 1485 dense tokens on average."""
    assert paper_ratio(576, 576, 1485) == pytest.approx(0.50, abs=0.005)


def test_llm_by_hand():
    """Width 4, FFN 6, 2 layers, 2 heads of 2, 1 key-value head; 3 text + 2 retained + 4 skipped + 1 summary."""
    llm = LlmSize(4, 6, 2, 2, 1, vocab_size=7)
    counts = llm_flops(llm, Tokens(text=3, retained=2, skipped=4, summaries=1), head_tokens=5)
    # a layer's projections: q and o are 4x4, k and v 4x2: 48 multiply-adds a row, 10 rows
    assert counts["llm_projections"] == 2 * (2 * 48 * 10)
    # scores and values: 2 heads * 10 * 10 * 2 wide, twice
    assert counts["llm_attention"] == 2 * (2 * 2 * (2 * 10 * 10 * 2))
    # gate, up, down: 3 * 4 * 6 multiply-adds for each of 6 rows
    assert counts["llm_ffn"] == 2 * (2 * 72 * 6)
    assert counts["lm_head"] == 2 * 5 * 4 * 7


def test_layers_that_do_not_skip_run_every_row():
    llm = LlmSize(4, 6, 2, 2, 1, vocab_size=7)
    tokens = Tokens(text=3, retained=2, skipped=4, summaries=1)
    assert llm_flops(llm, tokens, 0, skipping_layers=1)["llm_ffn"] == 2 * 72 * (6 + 10)
    assert llm_flops(llm, tokens, 0, skipping_layers=0)["llm_ffn"] == 2 * 72 * (10 + 10)


@pytest.mark.parametrize(
    ("family", "percent"), [("llava", 43), ("llava_hd", 29), ("cos", 35)], ids=["llava", "llava_hd", "cos"]
)
def test_the_language_models_own_work_with_200_text_tokens(family, percent):
    """LLaMA-3-8B: what is left of the decoder's work, to about a percent."""
    setting = next(iter(FAMILIES[family].values()))
    work = []
    for tokens in (Tokens(200, setting.dense_tokens), Tokens(200, setting.num_retained, setting.num_skipped, 2)):
        work.append(exact_flops(LLMS["llama-3-8b"], setting.encoder, setting, tokens, 0)["llm"])
    assert 100 * work[1] / work[0] == pytest.approx(percent, abs=1.2)


def test_training_multiplies_each_part():
    setting = FAMILIES["llava"]["100_156"]
    forward = exact_flops(LLMS["vicuna-7b"], setting.encoder, setting, Tokens(200, 576), 50)
    step = train_flops(forward)
    assert step["encoder_blocks"] == forward["encoder_blocks"]
    assert step["llm_ffn"] == 3 * forward["llm_ffn"]
    assert step["llm_attention"] == 3.5 * forward["llm_attention"]
    assert step["projector_in"] == 2 * forward["projector_in"]
    assert train_flops(forward, train_encoder=True)["encoder_blocks"] == 3 * forward["encoder_blocks"]
    assert train_flops(forward, train_llm=False)["llm_ffn"] == 2 * forward["llm_ffn"]
    assert train_flops(forward, recompute=True)["llm_ffn"] == 4 * forward["llm_ffn"]
    assert step["total"] == sum(value for name, value in step.items() if name not in ("llm", "total"))


def test_command_writes_the_contracts_keys(tmp_path, capsys):
    target = tmp_path / "flops.json"
    argv = ["flops", "--family", "llava", "--num-retained", "100", "--num-skipped", "156", "--json", str(target)]
    assert cli.main(argv) == 0
    report = json.loads(target.read_text())
    assert report["paper_ratio"] == pytest.approx(0.247, abs=5e-4)
    assert 0.40 < report["exact_ratio"] < 0.48
    assert report["dense"]["visual_tokens"] == 576
    assert report["skip"]["visual_tokens"] == 258
    assert report["skip"]["ffn_rows"] == 200 + 100 + 2
    assert "24.7%" in capsys.readouterr().out


def test_dense_tokens_and_own_sizes(tmp_path):
    target = tmp_path / "flops.json"
    names = ("hidden_size=8", "intermediate_size=16", "num_hidden_layers=1", "num_attention_heads=2")
    sizes = ",".join([*names, "num_key_value_heads=1", "vocab_size=9"])
    argv = ["--dense-tokens", "20", "--num-retained", "4", "--num-skipped", "6", "--llm-config", sizes]
    assert cli.main(["flops", "--family", "llava", *argv, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    assert report["paper_ratio"] == paper_flops(10, 4, 8, 16) / paper_flops(20, 20, 8, 16)
    assert report["llm"]["hidden_size"] == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--family", "lava"], "unknown family 'lava'; known: llava, llava_hd, cos"),
        (["--family", "cos", "--preset", "cos_99"], "known: cos_1296, cos_336, cos_80_448, cos_80"),
        (["--family", "cos", "--preset", "cos_336"], "--num-retained and --num-skipped are needed"),
        ([], "--family is missing; known: llava, llava_hd, cos"),
        (["--family", "llava", "--num-retained", "500"], "500 + --num-skipped 156 is more than the 576 dense tokens"),
        (["--family", "llava", "--num-retained", "0"], "--num-retained: too small"),
        (["--family", "llava", "--llm-config", "gpt"], "unknown language model 'gpt'; known: llama-3-8b, vicuna-7b"),
        (["--family", "llava", "--llm-config", "hidden_size=8"], "intermediate_size, num_hidden_layers"),
        (["--family", "llava", "--llm-config", "depth=8"], "cannot read 'depth=8'"),
        (["--model-path", "nowhere"], "--model-path nowhere: no readable config.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(["flops", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_counting_needs_no_torch():
    code = "import sys; sys.argv[0] = 'llava-sv'; import llava_sv.bench.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


DOCUMENTED = {
    "LLaVA 100 + 156 of 576": ("llava", "100_156"),
    "LLaVA 256 + 320 of 576": ("llava", "256_320"),
    "LLaVA-HD 576 + 576 of 2880": ("llava_hd", "2x2"),
    "CoS 272 + 256 of 1296": ("cos", "cos_1296"),
}


@pytest.mark.parametrize("label", DOCUMENTED)
def test_the_documented_table_is_what_the_command_says(label, tmp_path):
    family, preset = DOCUMENTED[label]
    target = tmp_path / "flops.json"
    assert cli.main(["flops", "--family", family, "--preset", preset, "--json", str(target)]) == 0
    report = json.loads(target.read_text())
    figures = (report[key] for key in ("paper_ratio", "exact_llm_ratio", "exact_ratio", "train_ratio"))
    row = f"| {label} | " + " | ".join(f"{figure:.1%}" for figure in figures) + " |"
    assert row in (Path(__file__).parents[2] / "docs/Benchmarks.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("switches", "rows"),
    [
        ({}, [9 + 2] * 2),
        ({"skip_ffn": False}, [9 + 11 + 2] * 2),
        ({"skip_layers": [1]}, [9 + 11 + 2, 9 + 2]),
        ({"last_visual_ffn": True}, [10 + 2] * 2),
        ({"merge": False}, [9 + 2] * 2),
    ],
)
def test_a_checkpoint_s_own_switches_count(tmp_path, switches, rows):
    """FFN rows, layer by layer, of a checkpoint whose config.json says what skips: 6 C M a row, by hand."""
    from llava_sv.model import LlavaConfig

    vision = CLIPVisionConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=4)
    config = LlavaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mm_vision_tower="random",
        mm_hidden_size=8,
        vision_config=vision.to_dict(),
        skip_vision={"num_retained": 9, "num_skipped": 11, **switches},
    )
    config.save_pretrained(tmp_path)
    report = tmp_path / "flops.json"
    assert cli.main(["flops", "--model-path", str(tmp_path), "--text-tokens", "5", "--json", str(report)]) == 0
    counted = json.loads(report.read_text())["skip"]["prefill"]["llm_ffn"]
    assert counted == sum(6 * (5 + count) * 16 * 24 for count in rows)
