"""What a benchmark needs of memory, and the refusals that come before any work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_sv import cli
from llava_sv.bench import clock, infer, room, train
from llava_sv.bench.models import make_batch, make_pair
from llava_sv.bench.sizes import SIZES, resized
from llava_sv.errors import UserError

CPU = torch.device("cpu")
TINY = SIZES["tiny"]["llava"]
FLAGS = ["--size", "tiny", "--dtype", "fp32", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def wide():
    """A size whose activations outweigh its weights."""
    return replace(TINY, batch=4, text_tokens=64, llm=replace(TINY.llm, vocab_size=2048))


def test_weights_are_the_models_own(wide):
    dense, _ = make_pair(wide, CPU, torch.float32)
    assert room.weights_of(wide, torch.float32) == sum(p.numel() * 4 for p in dense.parameters())
    assert room.of_train(wide, torch.float32, False).parts["weights"] == room.weights_of(wide, torch.float32)


def test_a_training_steps_estimate_is_near_what_it_takes(wide):
    """The dense model's step, counted as it runs: the estimate without its margin is within 15%."""
    dense, _ = make_pair(wide, CPU, torch.float32)
    forward = train.our_forwards(dense.train(), make_batch(wide, CPU, torch.float32))["model"]
    peak = train.weigh(dense, forward, CPU)["peak_bytes"]
    parts = room.of_train(wide, torch.float32, False).parts
    planned = parts["weights"] + parts["gradients"] + parts["activations"]
    assert planned == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("family", SIZES["tiny"])
def test_the_outside_control_s_logits_count(family):
    """transformers keeps those of all positions, its language model alone too: as made, and three of float32 each."""
    size = SIZES["tiny"][family]
    dense = {"llava": 64, "llava_hd": 320, "cos": 84}[family]
    logits = size.batch * (size.text_tokens + dense) * size.llm.vocab_size
    assert room.of_train(size, torch.bfloat16, True).parts["the peer's logits"] == logits * (2 + 12)
    assert room.of_train(size, torch.bfloat16, False).parts["the peer's logits"] == 0


def test_the_optimizers_states_are_two_of_each_gradient(wide):
    dense, _ = make_pair(wide, CPU, torch.float32)
    trained = sum(p.numel() for p in dense.parameters() if p.requires_grad)
    estimate = room.of_train(wide, torch.float32, False)
    assert estimate.optimizer == 2 * 4 * trained
    assert estimate.with_optimizer == int((sum(estimate.parts.values()) + estimate.optimizer) * room.MARGIN)


def test_an_answers_estimate_covers_what_it_takes(wide):
    dense, _ = make_pair(wide, CPU, torch.float32, 8)
    generate = infer.our_generate(dense.eval(), make_batch(wide, CPU, torch.float32), None)
    with torch.inference_mode():
        peak = clock.peak_bytes(lambda: generate(8), CPU, dense)
        cache = infer.cache_bytes(generate(8).past_key_values)
    estimate = room.of_infer(wide, torch.float32, 8)
    assert estimate.parts["KV cache"] == pytest.approx(cache, rel=0.02)
    assert peak < estimate.total < 2 * peak


@pytest.mark.parametrize("command", ["train", "infer"])
def test_a_size_that_does_not_fit_is_said_before_it_starts(command, monkeypatch, capsys):
    monkeypatch.setattr(room, "available_bytes", lambda device: 2**20)
    module = {"train": train, "infer": infer}[command]
    monkeypatch.setattr(module, "run", lambda *a, **k: pytest.fail("it started"))
    assert cli.main(["bench", command, *FLAGS]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: --size tiny, family llava, batch 2: bench {command} needs about 0.00" in error
    assert "0.000977 GiB are free on cpu; take fewer --layers, a smaller --batch, or --no-peers" in error


def test_without_peers_they_are_not_offered(monkeypatch, capsys):
    monkeypatch.setattr(room, "available_bytes", lambda device: 0)
    assert cli.main(["bench", "train", *FLAGS, "--no-peers", "--layers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.rstrip().endswith("take fewer --layers or a smaller --batch")
    assert "family llava, 1 of 2 layers, batch 2" in error


def test_an_optimizer_that_does_not_fit_is_left_out_and_said(monkeypatch, capsys, tmp_path):
    needed = room.of_train(TINY, torch.float32, False)
    monkeypatch.setattr(room, "available_bytes", lambda device: (needed.total + needed.with_optimizer) // 2)
    target = tmp_path / "r.md"
    assert cli.main(["bench", "train", *FLAGS, "--no-peers", "--markdown", str(target)]) == 0
    assert "the optimizer is not timed: with AdamW's states about" in capsys.readouterr().err
    assert "the optimizer is not timed" in target.read_text()


def test_memory_that_runs_out_after_all_is_one_line(monkeypatch, capsys):
    def out(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(infer, "run", out)
    assert cli.main(["bench", "infer", *FLAGS]) == 2
    error = capsys.readouterr().err
    assert "bench infer ran out of memory; take fewer --layers" in error
    assert error.count("\n") == 1


def test_other_errors_travel_on(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main(["bench", "train", *FLAGS])


def test_free_memory_is_within_the_control_groups_limit(monkeypatch, tmp_path):
    alone = room.available_bytes(CPU)
    assert alone > 2**20
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    monkeypatch.setattr(room, "OWN_GROUPS", tmp_path / "none")
    assert room.available_bytes(CPU) == 1000000
    (tmp_path / "memory.max").write_text("max\n")
    assert room.available_bytes(CPU) > 2**20


def group(folder, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def test_a_batch_system_s_limit_lies_between_the_process_and_the_top(monkeypatch, tmp_path):
    """Version 2: the job's limit, not its step's, which has none; pages of files that the kernel gives up are free."""
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    own = tmp_path / "own"
    own.write_text("0::/slurm/job_7/step_0\n")
    monkeypatch.setattr(room, "OWN_GROUPS", own)
    group(tmp_path / "slurm/job_7/step_0", max="max\n", current="9\n")
    group(tmp_path / "slurm/job_7", max="5000000\n", current="4000000\n", stat="anon 7\ninactive_file 300000\n")
    group(tmp_path / "slurm/job_8", max="10\n", current="0\n")
    assert room.available_bytes(CPU) == 1300000


def test_limits_of_version_1_count(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    own = tmp_path / "own"
    own.write_text("5:devices:/x\n4:memory:/box/1\n1:cpu,cpuacct:/box/1\n0::/\n")
    monkeypatch.setattr(room, "OWN_GROUPS", own)
    unlimited = {"limit_in_bytes": "9223372036854771712\n", "usage_in_bytes": "1000\n"}
    group(tmp_path / "memory", **unlimited)
    group(tmp_path / "memory/box/1", **unlimited)
    alone = room.available_bytes(CPU)
    assert 2**20 < alone < 2**60
    stat = "total_inactive_file 50\n"
    group(tmp_path / "memory/box/1", limit_in_bytes="9000\n", usage_in_bytes="2000\n", stat=stat)
    assert room.available_bytes(CPU) == 7050


def test_scores_are_counted_where_no_fused_kernel_serves():
    """float32 on CUDA with grouped heads: of all pairs of positions, a layer's each and three more."""
    cuda = torch.device("cuda")
    length = TINY.text_tokens + 64
    scores = TINY.batch * TINY.llm.num_attention_heads * length**2 * 4
    on_gpu = room.of_train(TINY, torch.float32, False, cuda)
    assert on_gpu.parts["attention's scores"] == scores * (TINY.llm.num_hidden_layers + 3)
    assert room.of_infer(TINY, torch.float32, 4, cuda).parts["attention's scores"] == 3 * scores
    for dtype, device in ((torch.bfloat16, cuda), (torch.float32, CPU), (torch.float32, None)):
        assert room.of_train(TINY, dtype, False, device).parts["attention's scores"] == 0
    ungrouped = replace(TINY, llm=replace(TINY.llm, num_key_value_heads=TINY.llm.num_attention_heads))
    assert room.of_train(ungrouped, torch.float32, False, cuda).parts["attention's scores"] == 0


def test_resized_keeps_what_is_not_given():
    assert resized(TINY) == TINY
    one = resized(TINY, layers=1)
    assert (one.llm.num_hidden_layers, one.layers_text) == (1, "1 of 2 layers")
    assert SIZES["gpu-8b-4layers"]["cos"].layers_text == "4 of 32 layers"
    with pytest.raises(UserError, match="--layers 33: this size has 32 decoder layers; take 1 to 32"):
        resized(SIZES["gpu-8b-4layers"]["llava"], layers=33)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "3"], "--layers 3: this size has 2 decoder layers; take 1 to 2 of them"),
        (["--layers", "0"], "--layers 0: this size has 2 decoder layers"),
        (["--batch", "0"], "--batch 0: expected 1 or more"),
        (["--text-tokens", "3"], "--text-tokens 3: expected 4 or more"),
        (["--num-retained", "0"], "--num-retained 0: expected 1 or more"),
        (["--num-retained", "60", "--num-skipped", "5"], "num_retained 60 + num_skipped 5 is more than the 64 patches"),
    ],
)
@pytest.mark.parametrize("command", ["train", "infer"])
def test_settings_that_cannot_be(command, argv, message, capsys):
    assert cli.main(["bench", command, *FLAGS, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["1", "16,x", "", "4,1", "-3"])
def test_lengths_that_cannot_be(text, capsys):
    assert cli.main(["bench", "infer", *FLAGS, f"--new-tokens={text}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --new-tokens {text}: ")


@pytest.mark.parametrize("flag", ["--json", "--markdown"])
@pytest.mark.parametrize("command", ["train", "infer"])
def test_an_output_that_exists_is_kept(command, flag, tmp_path, capsys, monkeypatch):
    target = tmp_path / "old"
    target.write_text("mine")
    module = {"train": train, "infer": infer}[command]
    monkeypatch.setattr(module, "measure", lambda job: pytest.fail("it started"))
    assert cli.main(["bench", command, *FLAGS, flag, str(target)]) == 2
    assert capsys.readouterr().err == f"error: {flag} {target}: exists; give another name, or --overwrite\n"
    assert target.read_text() == "mine"


def test_overwrite_replaces_it(tmp_path):
    target = tmp_path / "old"
    target.write_text("mine")
    argv = ["--no-peers", "--new-tokens", "2", "--markdown", str(target), "--overwrite"]
    assert cli.main(["bench", "infer", *FLAGS, *argv]) == 0
    assert target.read_text().startswith("Answer")
