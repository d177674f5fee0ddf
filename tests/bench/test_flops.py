"""FLOPs: the paper's table, hand-computed counts, and checkpoints of every family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import CLIPVisionConfig

from llava_sv import cli
from llava_sv.bench.exact import Tokens, llm_flops
from llava_sv.bench.flops import exact_flops, paper_flops, paper_ratio, train_flops
from llava_sv.bench.presets import CLIP_L_224, CLIP_L_336, FAMILIES, LLMS, LlmSize


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
        work.append(exact_flops(LLMS["llama-3-8b"], setting, tokens, 0)["llm"])
    assert 100 * work[1] / work[0] == pytest.approx(percent, abs=1.2)


def test_training_multiplies_each_part():
    setting = FAMILIES["llava"]["100_156"]
    forward = exact_flops(LLMS["vicuna-7b"], setting, Tokens(200, 576), 50)
    step = train_flops(forward)
    assert step["encoder_blocks"] == forward["encoder_blocks"]
    assert step["llm_ffn"] == 3 * forward["llm_ffn"]
    assert step["llm_attention"] == 3.5 * forward["llm_attention"]
    assert step["projector_in"] == 2 * forward["projector_in"]
    assert train_flops(forward, train_encoder=True)["encoder_blocks"] == 3 * forward["encoder_blocks"]
    assert train_flops(forward, train_llm=False)["llm_ffn"] == 2 * forward["llm_ffn"]
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


def sized(width, heads, shared):
    """`--llm-config` of a small model."""
    attention = f"num_attention_heads={heads},num_key_value_heads={shared}"
    return f"hidden_size={width},intermediate_size=96,num_hidden_layers=2,{attention},vocab_size=40"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--family", "lava"], "unknown family 'lava'; known: llava, llava_hd, cos"),
        (["--family", "cos", "--preset", "cos_99"], "known: cos_1296, cos_336, cos_80_448, cos_80"),
        (["--family", "cos", "--preset", "cos_336"], "--num-retained and --num-skipped are needed"),
        (["--num-retained", "5"], "--family is missing; known: llava, llava_hd, cos"),
        (["--preset", "2x2"], "--family is missing; known: llava, llava_hd, cos"),
        (["--family", "llava", "--num-retained", "500"], "500 + --num-skipped 156 is more than the 576 dense tokens"),
        (["--family", "llava", "--num-retained", "0"], "--num-retained 0: at least 1; counts are whole numbers"),
        (["--family", "llava", "--num-skipped", "-1"], "--num-skipped -1: at least 0"),
        (["--family", "cos", "--num-retained", "1297"], "1297 + --num-skipped 256 is more than the 1296 dense tokens"),
        (["--family", "llava", "--no-merge", "--num-retained", "577"], "is more than the 576 dense tokens"),
        (["--family", "llava", "--no-merge", "--num-skipped", "9"], "--num-skipped 9 does not go with --no-merge"),
        (["--family", "llava", "--new-tokens", "0"], "--new-tokens 0: at least 1"),
        (["--family", "llava", "--batch", "0"], "--batch 0: at least 1"),
        (["--family", "llava", "--dtype", "int3"], "unknown precision 'int3'; known: fp32, bf16, fp16"),
        (["--family", "llava", "--stage", "dpo"], "unknown stage 'dpo'; known: sft, pretrain"),
        (["--family", "llava", "--skip-kv", "all"], "unknown level 'all'; known: none, skipped, fine+skipped"),
        (["--family", "llava", "--skip-kv", "fine+skipped"], "family llava has none; use skipped"),
        (["--family", "llava", "--skip-layers", "30-32"], "no layer 32; this model has layers 0 to 31"),
        (["--family", "llava", "--skip-layers", "x"], "skip_layers"),
        (["--table", "--family", "cos"], "--table is of the paper's four settings"),
        (["--table", "--memory"], "switches and --memory go with --family or --model-path"),
        (["--text-tokens", "-1"], "--text-tokens -1: at least 0"),
        (["--batch", "8"], "the paper's table takes --text-tokens and --new-tokens alone"),
        (["--table", "--stage", "pretrain"], "the paper's table takes --text-tokens and --new-tokens alone"),
        (["--family", "llava", "--supervised-tokens", "201"], "--supervised-tokens 201: there are 200 text tokens"),
        (["--family", "llava", "--memory", "--dense-tokens", "400"], "--memory runs the preset's own; leave it out"),
        (["--family", "llava", "--memory", "--text-tokens", "1"], "--text-tokens 1: --memory trains on 2 or more"),
        (["--family", "llava", "--llm-config", "gpt"], "unknown language model 'gpt'; known: llama-3-8b, vicuna-7b"),
        (["--family", "llava", "--llm-config", "hidden_size=8"], "intermediate_size, num_hidden_layers"),
        (["--family", "llava", "--llm-config", "depth=8"], "cannot read 'depth=8'"),
        (["--family", "llava", "--llm-config", "hidden_size=\u00b2"], "cannot read 'hidden_size=\u00b2'"),
        (["--family", "llava", "--llm-config", sized(64, 3, 1)], "64 is no multiple of num_attention_heads 3"),
        (["--family", "llava", "--llm-config", sized(64, 4, 3)], "4 is no multiple of num_key_value_heads 3"),
        (["--model-path", "nowhere"], "--model-path nowhere: no readable config.json"),
        (["--model-path", "nowhere", "--preset", "2x2"], "--preset does not go with --model-path"),
        (["--model-path", "nowhere", "--image-size", "640"], "--image-size: cannot read '640'; write width x height"),
        (["--family", "llava_hd", "--image-size", "640x480"], "--image-size goes with --model-path"),
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


def test_section_6_s_shares_are_the_presets_own(capsys):
    """Without --preset: each family's first."""
    for family, percent in (("llava", 24.7), ("llava_hd", 24.7), ("cos", 26.0)):
        assert cli.main(["flops", "--family", family]) == 0
        assert f"{percent}%" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("preset", FAMILIES["cos"])
def test_cos_presets_are_the_resampler_s(preset):
    from llava_sv.model.cos_presets import scales_of

    setting = FAMILIES["cos"][preset]
    scales = scales_of(SimpleNamespace(mm_projector_type=preset), int(setting.encoder.patches**0.5))
    assert setting.windows == tuple((scale.window, scale.queries) for scale in scales)
    assert setting.dense_tokens == sum(scale.queries for scale in scales)


def test_encoder_by_hand():
    """23 blocks of 577 rows: q, k, v and out; scores and values; two FFN layers of 4 E."""
    setting = FAMILIES["llava"]["100_156"]
    counts = exact_flops(LLMS["llama-3-8b"], setting, Tokens(0, 576), 0)
    assert counts["encoder_blocks"] == 23 * 577 * 2 * (4 * 1024**2 + 8 * 1024**2)
    assert counts["encoder_attention"] == 23 * 2 * 2 * 577**2 * 1024
    assert counts["encoder_patches"] == 2 * 576 * 3 * 14 * 14 * 1024
    assert CLIP_L_224.num_blocks == CLIP_L_336.num_blocks == 23


def test_resampler_by_hand():
    """cos_80: two levels; queries of both scales, keys and values of 256 patches a scale; windows of 256, 16."""
    setting = FAMILIES["cos"]["cos_80"]
    counts = exact_flops(LLMS["llama-3-8b"], setting, Tokens(0, 80), 0)
    a_row = 2 * 1024**2
    assert counts["resampler_linear"] == 2 * a_row * (2 * 80 + 2 * 2 * 256 + 8 * 80)
    assert counts["resampler_attention"] == 2 * (2 * 2 * 1024 * (16 * 256 + 64 * 16))
    assert counts["projector_out"] == 80 * 2 * 1024 * 4096


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


PAPER = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32}


def written(folder: Path, image_size: int, **settings) -> list[str]:
    """Flags that name a checkpoint's folder: CLIP ViT-L/14 at `image_size` and LLaMA-3-8B's widths; no weights."""
    from llava_sv.model import LlavaConfig

    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    vision.image_size, vision.patch_size = image_size, 14
    more = {"num_key_value_heads": 8, "mm_hidden_size": 1024, "mm_vision_tower": "random"}
    LlavaConfig(**{**PAPER, **more, "vision_config": vision.to_dict(), **settings}).save_pretrained(folder)
    return ["flops", "--model-path", str(folder)]


def counted(argv: list[str], folder: Path) -> dict:
    assert cli.main([*argv, "--json", str(folder / "flops.json"), "--overwrite"]) == 0
    return json.loads((folder / "flops.json").read_text())


HD = {"mm_family": "llava_hd", "skip_vision": {"num_retained": 576, "num_skipped": 576}}
COS = {
    "mm_family": "cos",
    "mm_projector_type": "cos_1296",
    "mm_vision_feature_levels": [15, 22],
    "skip_vision": {"num_retained": 272, "num_skipped": 256},
}


@pytest.mark.parametrize(
    ("side", "settings", "preset"), [(336, HD, ("llava_hd", "2x2")), (448, COS, ("cos", "cos_1296"))], ids=["hd", "cos"]
)
def test_a_checkpoint_of_the_paper_s_setting_counts_as_the_preset_does(side, settings, preset, tmp_path):
    """All but the language model's depth: views, windows, levels and blocks come from the checkpoint's config."""
    own = counted(written(tmp_path, side, **settings), tmp_path)
    family, name = preset
    theirs = counted(["flops", "--family", family, "--preset", name], tmp_path)
    assert own["paper_ratio"] == theirs["paper_ratio"]
    assert own["encoder"] == theirs["encoder"]
    assert own["family"] == family
    for key in ("visual_tokens", "sequence", "ffn_rows"):
        assert [own[who][key] for who in ("dense", "skip")] == [theirs[who][key] for who in ("dense", "skip")]
    parts = [name for name in theirs["skip"]["prefill"] if not name.startswith(("llm", "lm_head", "total"))]
    for stage in ("prefill", "train"):
        for part in parts:
            assert own["skip"][stage][part] == theirs["skip"][stage][part]


@pytest.mark.parametrize(
    ("size", "views", "dense", "retained", "skipped", "summaries"),
    [
        (None, 5, 2880, 576, 576, 2),
        ("1344x336", 5, 2880, 576, 576, 2),
        ("1000x500", 3, 1728, 576, 576, 2),
        ("336x200", 1, 576, 576, 0, 1),
    ],
)
def test_an_hd_checkpoint_counts_the_image_s_own_tiles(size, views, dense, retained, skipped, summaries, tmp_path):
    argv = written(tmp_path, 336, **HD)
    report = counted([*argv, *(["--image-size", size] if size else [])], tmp_path)
    assert (report["views"], report["dense_tokens"]) == (views, dense)
    assert (report["num_retained"], report["num_skipped"]) == (retained, skipped)
    assert report["skip"]["visual_tokens"] == retained + skipped + summaries
    assert report["skip"]["prefill"]["merge"] == 2 * (dense - 576) * (skipped + 1) * 4096
    assert report["skip"]["prefill"]["summaries"] == 4 * (retained + skipped) * 4096
    assert report["paper_ratio"] == paper_ratio(retained, skipped, dense)


def test_an_hd_checkpoint_that_keeps_part_of_the_overview_merges_its_rest(tmp_path):
    budget = {"num_retained": 100, "num_skipped": 156}
    report = counted(written(tmp_path, 336, mm_family="llava_hd", skip_vision=budget), tmp_path)
    assert report["skip"]["prefill"]["merge"] == 2 * (476 + 4 * 576) * (156 + 1) * 4096
    whole = counted([*written(tmp_path, 336, mm_family="llava_hd", skip_vision={**budget, "merge": False})], tmp_path)
    assert (whole["num_skipped"], whole["skip"]["prefill"]["merge"]) == (476 + 4 * 576, 0)


def test_an_anyres_checkpoint_counts_newlines_and_no_padding(tmp_path):
    """1000x500 on 2x1 tiles of 24: nothing is padding, 24 rows end in a newline; 1000x400 fills 60 of 3x1's 72."""
    argv = written(tmp_path, 336, **{**HD, "image_aspect_ratio": "anyres"})
    report = counted([*argv, "--image-size", "1000x500"], tmp_path)
    assert (report["views"], report["dense_tokens"]) == (3, 576 + 48 * 24 + 24)
    assert report["skip"]["prefill"]["merge"] == 2 * (48 * 24) * (576 + 1) * 4096
    report = counted([*argv, "--image-size", "1000x400"], tmp_path)
    assert (report["views"], report["dense_tokens"]) == (4, 576 + 60 * 24 + 24)
    assert report["skip"]["prefill"]["merge"] == 2 * (60 * 24) * (576 + 1) * 4096


@pytest.mark.parametrize(
    ("levels", "blocks", "scale"), [([15, 22], 23, 1.0), ([4], 5, 0.5)], ids=["the paper's", "one level"]
)
def test_a_cos_checkpoint_s_levels_say_which_blocks_run(levels, blocks, scale, tmp_path):
    report = counted(written(tmp_path, 448, **{**COS, "mm_vision_feature_levels": levels}), tmp_path)
    assert report["encoder"]["num_blocks"] == blocks
    preset = exact_flops(LLMS["llama-3-8b"], FAMILIES["cos"]["cos_1296"], Tokens(0, 1296), 0)
    assert report["dense"]["prefill"]["resampler_linear"] == scale * preset["resampler_linear"]


def test_a_checkpoint_s_budget_can_be_replaced(tmp_path, capsys):
    argv = written(tmp_path, 336, **{**HD, "skip_vision": None})
    assert cli.main(argv) == 2
    assert "--num-retained and --num-skipped are needed here" in capsys.readouterr().err
    report = counted([*argv, "--num-retained", "64", "--num-skipped", "32"], tmp_path)
    assert (report["num_retained"], report["num_skipped"]) == (64, 32)
    assert cli.main([*argv, "--num-retained", "577", "--num-skipped", "32"]) == 2
    assert "num_retained 577 is more than the 576 patches of the overview" in capsys.readouterr().err
    assert cli.main([*argv, "--family", "cos", "--num-retained", "64", "--num-skipped", "32"]) == 2
    assert "is of family llava_hd; leave it out" in capsys.readouterr().err


def test_one_summary_pools_its_own_end_only(tmp_path):
    block = {"num_retained": 100, "num_skipped": 156, "latter_summary": False}
    report = counted(written(tmp_path, 336, skip_vision=block), tmp_path)
    assert report["skip"]["prefill"]["summaries"] == 4 * 100 * 4096


@pytest.mark.parametrize(("model_type", "rows"), [("clip_vision_model", 577), ("siglip_vision_model", 576)])
def test_only_an_encoder_with_cls_runs_a_row_for_it(model_type, rows):
    from llava_sv.bench.checkpoint import encoder_of

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "patch_size": 14}
    config = SimpleNamespace(
        vision_config={**sizes, "image_size": 336, "model_type": model_type},
        mm_vision_select_layer=-2,
        mm_vision_feature_levels=None,
        num_patches=576,
    )
    assert encoder_of(config).rows == rows


def test_heads_of_their_own_width(tmp_path):
    """Qwen3's heads are 128 wide whatever C is."""
    from llava_sv.bench.checkpoint import llm_of
    from llava_sv.model.language_model.llava_qwen3 import LlavaQwen3Config

    config = LlavaQwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    assert llm_of(config).head_dim == 128
    assert LlmSize(1024, 4096, 2, 16, 8, 100).head_dim == 64
