"""The report: its keys, its ratios by hand, its page, and what it says when a source is missing."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llava_sv.bench import flops
from llava_sv.errors import exit_on_user_error
from llava_sv.eval import report

TIMING = {
    "time_to_first_token_ms": 20.0,
    "decode_ms_per_token": 4.0,
    "kv_bytes_prefill": 4096,
    "kv_bytes": 4096,
    "prompt_tokens": 60,
    "samples": 6,
    "repeats": 5,
    "new_tokens": 33,
}
CHANCE = {"accuracy": 0.3, "per_category": {"existence": 0.5, "count": 0.1}}


def result(checkpoint, accuracy):
    return {
        "model_path": str(checkpoint),
        "accuracy": accuracy,
        "per_category": {"existence": accuracy, "count": accuracy},
        "questions": 12,
        "chance": CHANCE,
        "peak_memory_bytes": 2**30,
    }


@pytest.fixture
def sources(tmp_path, dense_checkpoint, skip_checkpoint):
    values = {
        "dense": result(dense_checkpoint, 0.95),
        "skip": result(skip_checkpoint, 0.9375),
        "blind": result(skip_checkpoint, 0.35),
        "timing": {"dense": TIMING, "skip": {**TIMING, "kv_bytes": 1024, "kv_bytes_prefill": 2048}},
    }
    for name, value in values.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    argv = ["--model-path", str(skip_checkpoint), "--text-tokens", "8", "--json", str(tmp_path / "flops.json")]
    assert flops.main(argv) == 0
    return tmp_path


def arguments(sources, bench, output):
    image = sorted((bench / "images").glob("bench-*"))[0]
    files = [f"--{name}={sources / name}.json" for name in ("dense", "skip", "blind", "timing", "flops")]
    return [*files, "--image", str(image), "--seed", "7", "--output", str(output)]


def test_report_holds_every_promised_key_and_figure(
    sources, bench, tmp_path, dense_checkpoint, skip_checkpoint, capsys
):
    output = tmp_path / "out"
    assert report.main(arguments(sources, bench, output)) == 0
    made = json.loads((output / "report.json").read_text())
    for name, checkpoint, accuracy, seconds in (
        ("dense", dense_checkpoint, 0.95, 20.0),
        ("skip", skip_checkpoint, 0.9375, 10.0),
    ):
        assert made[name]["accuracy"] == accuracy
        assert made[name]["per_category"] == {"existence": accuracy, "count": accuracy}
        assert made[name]["train_seconds"] == seconds
        assert made[name]["checkpoint"] == str(checkpoint)
    assert made["blind"]["accuracy"] == 0.35
    assert made["chance"] == CHANCE
    assert made["kv_ratio"] == 0.25
    # 16 patches, 4 retained and 5 skipped; width 32, FFN 64: 4 N1 C^2 + 2 N1^2 C + 3 N2 C M
    skip_flops = 4 * 9 * 32**2 + 2 * 9**2 * 32 + 3 * 4 * 32 * 64
    dense_flops = 4 * 16 * 32**2 + 2 * 16**2 * 32 + 3 * 16 * 32 * 64
    assert made["flops_ratio"] == pytest.approx(skip_flops / dense_flops)
    assert made["flops_ratio"] < made["exact_flops_ratio"] < 1
    assert made["seed"] == 7

    page = (output / "report.md").read_text()
    assert "| count | 95.0% | 93.8% | 35.0% | 10.0% |" in page
    assert "| SFT time | 20.0 s | 10.0 s | 0.500 |" in page
    assert "| KV cache while decoding | 4.0 KiB | 1.0 KiB | 0.250 |" in page
    assert page.strip() in capsys.readouterr().out
    for name in ("report.png", "patches.png"):
        with Image.open(output / name) as image:
            assert image.format == "PNG"
            assert image.width > 800


def test_missing_and_broken_sources_are_named(sources, bench, tmp_path, capsys):
    def fails(message):
        assert exit_on_user_error(report.main, arguments(sources, bench, tmp_path / "out")) == 2
        assert message in capsys.readouterr().err

    blind = (sources / "blind.json").read_text()
    (sources / "blind.json").unlink()
    fails(f"no such file: {sources / 'blind.json'}; run bash scripts/quickstart.sh")
    (sources / "blind.json").write_text("{,")
    fails("blind.json, line 1, column 2: not JSON")
    (sources / "blind.json").write_text(blind)
    (sources / "timing.json").unlink()
    fails(f"no such file: {sources / 'timing.json'}")
    assert not (tmp_path / "out").exists()
