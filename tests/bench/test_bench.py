"""The benchmarks' reports: keys, figures that can be checked by hand, refusals. No test judges a time."""

from __future__ import annotations

import json

import pytest
import torch

from llava_sv import cli
from llava_sv.bench import clock, table
from llava_sv.bench.models import make_batch, make_config, make_pair
from llava_sv.bench.peers import LLM_PEER, PEER, make_stock_llama, make_stock_llava, stock_inputs
from llava_sv.bench.presets import FAMILIES
from llava_sv.bench.sizes import SIZES
from llava_sv.bench.train import llama_forwards
from llava_sv.errors import UserError
from llava_sv.model.loading import check_config

SIZE = SIZES["tiny"]["llava"]
DENSE_TOKENS = 64
CPU = torch.device("cpu")


def report_of(command: str, tmp_path_factory, *more: str, family: str = "llava") -> dict:
    target = tmp_path_factory.mktemp(command) / "report.json"
    argv = ["bench", command, "--size", "tiny", "--family", family, "--dtype", "fp32", "--repeats", "2"]
    assert cli.main([*argv, "--device", "cpu", "--json", str(target), *more]) == 0
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return report_of("train", tmp_path_factory)


@pytest.fixture(scope="module")
def infer(tmp_path_factory):
    return report_of("infer", tmp_path_factory)


@pytest.mark.parametrize("which", ["train", "infer"])
def test_reports_have_the_contracts_keys(which, request):
    report = request.getfixturevalue(which)
    for key in ("dense", "skip", "time_saved", "flops_saved", "peers", "environment", "size", "family"):
        assert key in report
    assert {"device", "dtype", "torch", "transformers", "threads", "date"} <= set(report["environment"])
    assert report["environment"]["dtype"] == "float32"
    assert "dense_over_peer" in report["peers"][PEER]


def test_train_report_has_both_regions_and_the_llm_on_top(train):
    assert set(train["regions"]) == {"llm", "model"}
    for region in train["regions"].values():
        for name in ("dense", "skip"):
            assert {"step_ms", "cpu_ms", "forward_ms", "backward_ms", "flops", "activation_bytes"} <= set(region[name])
        assert region["skip"]["flops"] < region["dense"]["flops"]
        assert region["skip"]["activation_bytes"] < region["dense"]["activation_bytes"]
        saved = 1 - region["skip"]["flops"] / region["dense"]["flops"]
        assert region["flops_saved"] == pytest.approx(saved)
    assert train["flops_saved"] == train["regions"]["llm"]["flops_saved"]
    # the encoder costs the same on both sides, so the share saved of the whole is smaller
    assert train["regions"]["model"]["flops_saved"] < train["flops_saved"]


def test_infer_report_counts_the_caches_bytes(infer):
    """Keys and values, float32: 2 x layers x batch x kv heads x head width x 4 bytes a token."""
    llm = SIZE.llm
    a_token = 2 * llm.num_hidden_layers * SIZE.batch * llm.num_key_value_heads * llm.head_dim * 4
    tokens = {
        "dense": SIZE.text_tokens + DENSE_TOKENS,
        "skip": SIZE.text_tokens + SIZE.num_retained + 2,
        "skip_keeping_cache": SIZE.text_tokens + SIZE.num_retained + SIZE.num_skipped + 2,
    }
    for name, count in tokens.items():
        assert infer[name]["kv_tokens"] == count
        assert infer[name]["kv_bytes"] == count * a_token
    assert infer["kv_saved"] == pytest.approx(1 - tokens["skip"] / tokens["dense"])


def test_infer_report_keeps_prefill_and_decode_apart(infer):
    assert set(infer["regions"]) == {"prefill", "decode", "end_to_end"}
    for name in ("dense", "skip"):
        row = infer[name]
        parts = row["flops"]["prefill"] + (infer["new_tokens"] - 1) * row["flops"]["decode"]
        assert parts == pytest.approx(row["flops"]["end_to_end"])
        assert {"prefill_ms", "decode_ms_per_token", "end_to_end_ms"} <= set(row)
    assert infer["skip"]["flops"]["decode"] < infer["skip_keeping_cache"]["flops"]["decode"]


def test_the_peer_is_the_same_model():
    """transformers' LLaVA with our weights gives our dense model's loss and gradients: the race is fair."""
    dense, _ = make_pair(SIZE, CPU, torch.float32)
    batch = make_batch(SIZE, CPU, torch.float32)
    stock = make_stock_llava(dense).train()
    ours = dense.train()(input_ids=batch.input_ids, labels=batch.labels, images=batch.images).loss
    theirs = stock(**stock_inputs(batch, dense)).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(
        dense.model.layers[0].mlp.up_proj.weight.grad,
        stock.model.language_model.layers[0].mlp.up_proj.weight.grad,
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize("family", ["llava_hd", "cos"])
def test_the_language_model_peer_is_the_same_decoder(family):
    """On what our dense model spliced, transformers' own decoder gives its loss."""
    size = SIZES["tiny"][family]
    dense, _ = make_pair(size, CPU, torch.float32)
    batch = make_batch(size, CPU, torch.float32)
    ours = dense.train()(input_ids=batch.input_ids, labels=batch.labels, images=batch.images).loss
    theirs = llama_forwards(make_stock_llama(dense).train(), dense, batch)["llm"]()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_table_has_a_cell_under_every_heading(train, infer):
    tables = [part for part in table.render([train, infer]).split("\n\n") if part.startswith("|")]
    counts = [len(train["regions"]), len(("dense", "skip")), len(infer["regions"]), len(infer["lengths"])]
    assert len(tables) == len(counts)
    for rows, count in zip((t.splitlines() for t in tables), counts):
        assert len(rows) == 2 + count
        assert len({row.count("|") for row in rows}) == 1
    assert f"{train['flops_saved']:.1%}" in tables[0]


def test_no_peers(tmp_path_factory):
    assert report_of("train", tmp_path_factory, "--no-peers")["peers"] == {}
    assert report_of("infer", tmp_path_factory, "--no-peers", "--new-tokens", "3")["peers"] == {}


OTHERS = {"llava_hd": (320, 64, 64), "cos": (84, 20, 16)}
"""Family -> dense, retained and skipped tokens of its tiny size."""


@pytest.mark.parametrize("family", OTHERS)
def test_train_report_of_other_families(family, tmp_path_factory):
    """Dense is the dense control of the same family; encoder and projector cost the same on both sides."""
    report = report_of("train", tmp_path_factory, "--repeats", "1", family=family)
    assert report["family"] == family
    assert set(report["regions"]["llm"]["peers"]) == {LLM_PEER}
    assert report["regions"]["model"]["peers"] == {}
    for region in report["regions"].values():
        assert 0 < region["flops_saved"] < 1
        assert region["skip"]["activation_bytes"] < region["dense"]["activation_bytes"]
    assert report["regions"]["model"]["flops_saved"] < report["flops_saved"]
    assert table.render([report]).count(f"| tiny, {family} |") == 4


@pytest.mark.parametrize("family", OTHERS)
def test_infer_report_of_other_families(family, tmp_path_factory):
    report = report_of("infer", tmp_path_factory, "--repeats", "1", "--new-tokens", "3", family=family)
    dense, retained, skipped = OTHERS[family]
    tokens = {"dense": dense, "skip": retained + 2, "skip_keeping_cache": retained + skipped + 2}
    assert {name: report[name]["kv_tokens"] - SIZE.text_tokens for name in tokens} == tokens
    assert set(report["peers"][LLM_PEER]["dense_over_peer"]) == {"decode"}
    assert report["peers"][LLM_PEER]["kv_bytes"] == report["dense"]["kv_bytes"]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_of_every_family(size):
    """Each is a model that can be built; all but the tiny ones have the paper's token counts."""
    assert set(SIZES[size]) == set(FAMILIES)
    for family, chosen in SIZES[size].items():
        skip = {"num_retained": chosen.num_retained, "num_skipped": chosen.num_skipped}
        config = make_config(chosen, skip)
        check_config(config, config.vision_config)
        assert config.mm_family == chosen.family == family
        assert config.visual_tokens_per_image() == chosen.num_retained + chosen.num_skipped + 2
        if size != "tiny":
            setting = next(iter(FAMILIES[family].values()))
            assert config.dense_tokens_per_image() == setting.dense_tokens
            assert (chosen.num_retained, chosen.num_skipped) == (setting.num_retained, setting.num_skipped)


def test_rounds_run_everyone_once_a_round_in_turning_order():
    order = []

    def step(name):
        return lambda: order.append(name) or {"ms": float(len(order))}

    measured = clock.rounds({name: step(name) for name in "abc"}, repeats=5, warmup=1, what="test")
    runs = ["".join(order[start : start + 3]) for start in range(0, 18, 3)]
    assert runs == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert [result["ms"] for result in measured["a"]] == [6.0, 9.0, 10.0, 14.0, 17.0]
    # over a whole turn each comes first equally often, and after each of the others too
    assert {name: sum(run[0] == name for run in runs) for name in "abc"} == dict.fromkeys("abc", 2)
    assert {pair: sum(pair in run for run in runs) for pair in ("ab", "ba", "ac", "ca", "bc", "cb")} == dict.fromkeys(
        ("ab", "ba", "ac", "ca", "bc", "cb"), 2
    )


def test_ratios_are_taken_within_a_round():
    slow = [{"ms": 10.0}, {"ms": 100.0}, {"ms": 30.0}]
    fast = [{"ms": 5.0}, {"ms": 50.0}, {"ms": 10.0}]
    assert clock.median_ratio(slow, fast, "ms") == 2.0
    assert clock.quartiles(slow, fast, "ms") == [2.0, 2.5]
    assert clock.medians(slow) == {"ms": 30.0}


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = torch.nn.Linear(8, 8)
    x = torch.ones(4, 8)
    saved = clock.SavedBytes(layer)
    with saved.watch():
        hidden = layer(x)
        (hidden * hidden).sum()
    # x for the weight's gradient, hidden (twice, one storage) for the product's
    assert saved.total == 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "huge"], "unknown size 'huge'; known: tiny, cpu, gpu-8b, gpu-8b-4layers"),
        (["--family", "lava"], "unknown family 'lava'; known: llava"),
        (["--dtype", "int8"], "unknown precision 'int8'; known: fp32, bf16"),
        (["--repeats", "0"], "--repeats 0: at least one round"),
        (["--device", "tpu"], "--device tpu: unknown device; known: cpu, cuda, cuda:N"),
        (["--device", "cuda:x"], "--device cuda:x: unknown device; known: cpu, cuda, cuda:N"),
        (["--device", "meta"], "--device meta: computes nothing; use cpu, cuda or cuda:N"),
        (["--device", "mps"], "--device mps: times and memory are measured on cpu and cuda only"),
    ],
)
@pytest.mark.parametrize("command", ["train", "infer"])
def test_mistakes_are_one_line_and_exit_code_2(command, argv, message, capsys):
    assert cli.main(["bench", command, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_where_there_is_none(capsys):
    assert cli.main(["bench", "train", "--device", "cuda"]) == 2
    assert "no CUDA GPU is usable here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("command", ["train", "infer"])
def test_on_a_gpu(command, tmp_path):
    target = tmp_path / "report.json"
    argv = ["--size", "tiny", "--device", "cuda", "--repeats", "2", "--json", str(target)]
    assert cli.main(["bench", command, *argv]) == 0
    report = json.loads(target.read_text())
    assert report["environment"]["device"] == torch.cuda.get_device_name(0)
    assert report["skip"]["peak_bytes"] > 0


def test_one_of_several_gpus_is_the_one_that_runs(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert clock.pick_device("cuda:1") == torch.device("cuda", 1)
    assert clock.pick_device("cuda") == clock.pick_device(None) == torch.device("cuda")
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(UserError, match="--device cuda:2: GPUs here are cuda:0 to cuda:1; name one"):
        clock.pick_device("cuda:2")
