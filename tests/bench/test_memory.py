"""The memory plan against memory that was measured, and against counts by hand."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from llava_sv import cli
from llava_sv.bench import memory, memory_measure
from llava_sv.bench.memory_cases import Case, every_case, plan_of
from llava_sv.bench.memory_measure import peak_of, peak_of_tensors, train_steps
from llava_sv.bench.memory_ranks import measure
from llava_sv.bench.memory_states import Layout, layout_of
from llava_sv.bench.memory_trace import Work, forward, trace
from llava_sv.errors import UserError

CPU = torch.device("cpu")

SAMPLE = [
    Case(skips=True, batch=2, precision="bf16"),
    Case("llava_hd", checkpointing=True, trained="with encoder"),
    Case("cos", skips=True, checkpointing=True, trained="projector"),
    Case("cos", trained="LoRA", precision="bf16", batch=2),
    Case(skips=True, checkpointing=True, accumulating=True),
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_plan_is_what_the_allocator_gives_out(case):
    row = memory.run_alone(case, CPU)
    # nothing is fitted: torch's own engine runs on shapes, so that hardly a byte differs
    assert row["ratio"] == pytest.approx(1, abs=0.01)


def test_the_two_yardsticks_agree():
    case = Case(skips=True)

    def steps(watching):
        watching(True)
        train_steps(case.config(), case.work(), case.prepare, CPU)

    alone = peak_of(lambda: train_steps(case.config(), case.work(), case.prepare, CPU), CPU)
    assert peak_of_tensors(steps) == pytest.approx(alone, rel=0.01)


def test_allocations_are_added_up():
    def run():
        kept = torch.empty(2**20, dtype=torch.uint8)
        torch.empty(3 * 2**20, dtype=torch.uint8)
        del kept
        torch.empty(2 * 2**20, dtype=torch.uint8)

    assert peak_of(run, CPU) == pytest.approx(4 * 2**20, abs=1024)


def test_parameters_are_those_of_the_model():
    case = Case(skips=True)
    found = trace(case.config(), case.work(), case.prepare, lambda name: name.split(".")[0])
    attention = 256 * 256 * 2 + 256 * 128 * 2
    layer = attention + 3 * 256 * 896 + 2 * 256
    projector = 128 * 256 + 256 + 256 * 256 + 256
    assert found.trained == 4 * layer + 2 * 8192 * 256 + 256 + projector + 2 * 256
    assert found.weight_bytes == 4 * found.total
    assert found.sequence == 256 + 24 + 40 + 2


def test_skipping_checkpointing_and_batch_show():
    base = plan_of(Case("llava_hd", batch=2)).tensors
    assert plan_of(Case("llava_hd", batch=2, skips=True)).tensors < base
    assert plan_of(Case("llava_hd", batch=2, checkpointing=True)).tensors < base
    assert plan_of(Case("llava_hd", batch=1)).tensors < base


def test_states_by_stage():
    """12 bytes of float32 copy and AdamW's states a trained parameter over the processes; weights at stage 3."""
    parts = {stage: plan_of(Case(layout=f"ZeRO-{stage}", precision="bf16")).parts for stage in (1, 2, 3)}
    case = Case(layout="ZeRO-1", precision="bf16")
    found = trace(case.config(), case.work(), case.prepare, lambda name: "model")
    for part in parts.values():
        assert part["optimizer"] == pytest.approx(12 * found.trained / 2, abs=64)
    assert parts[2]["weights"] == pytest.approx(2 * found.total, rel=0.001)
    assert parts[3]["weights"] == pytest.approx(found.total, rel=0.02)
    assert parts[3]["gathered weights"] == 2 * (found.total - found.run_once)


def test_layout_of_a_configuration():
    zero = {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}
    layout = layout_of({"zero_optimization": zero}, 8, 4096)
    assert (layout.stage, layout.world, layout.reduce_bucket) == (3, 8, 4096**2)
    assert (layout.offload_optimizer, layout.offload_param) == (True, False)
    assert layout_of(None, 2, 64) == Layout(world=2)


@pytest.mark.slow
def test_two_processes_are_within_the_tolerance():
    pytest.importorskip("deepspeed")
    cases = [Case(layout=layout, precision="bf16") for layout in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")]
    for case, peak in zip(cases, measure(cases)):
        assert plan_of(case).tensors / peak == pytest.approx(1, abs=0.15), case.name


def test_unknown_family():
    with pytest.raises(UserError, match="unknown family 'qwen'; known: llava, llava_hd, cos"):
        memory.main(["--family", "qwen"])


def test_precision_is_that_of_the_device_that_runs(monkeypatch):
    """On CUDA the CPU's autocast would leave everything in float32."""
    kinds = []

    def autocast(kind, dtype):
        kinds.append((kind, dtype))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    for kind in ("cpu", "cuda"):
        inputs = {"input_ids": SimpleNamespace(device=torch.device(kind))}
        forward(lambda **_: SimpleNamespace(loss=0), inputs, Work(1, 4, autocast=torch.bfloat16))
    assert kinds == [("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]


def test_on_a_gpu_the_second_run_counts_and_what_was_asked_for(monkeypatch):
    """The first leaves 32 MiB behind, as cuBLAS does; the second asks for 5 beside them."""
    state = {"requested_bytes.all.current": 0, "requested_bytes.all.peak": 0}
    runs = []

    def run() -> None:
        runs.append(1)
        state["requested_bytes.all.current"] = 32
        state["requested_bytes.all.peak"] = 32 + 5

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: state)
    assert memory_measure.peak_of(run, torch.device("cuda")) == 5
    assert len(runs) == 2


def test_on_a_gpu_cases_run_in_its_precision():
    cases = list(every_case())
    assert {case.precision for case in memory.on_device(cases, torch.device("cuda"))} == {"bf16"}
    assert memory.on_device(cases, torch.device("cpu")) == cases


@pytest.mark.parametrize("command", ["memory", "data"])
def test_a_report_that_exists_is_kept(command, tmp_path, capsys):
    target = tmp_path / "old.json"
    target.write_text("mine")
    assert cli.main(["bench", command, "--json", str(target)]) == 2
    assert capsys.readouterr().err == f"error: --json {target}: exists; give another name, or --overwrite\n"
    assert target.read_text() == "mine"
