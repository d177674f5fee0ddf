"""`llava-sv bench train`: a training step, dense against skipping, on the same weights and kernels.

A size arrives; times, FLOPs and bytes of two regions leave. `llm`: decoder, head and loss on a spliced batch. `model`:
all of it, encoder, projector, selection, merge, summaries and splice included. Both are forward and backward; the split
of a whole step, data and optimizer included, is measured apart (`split`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from llava_sv.bench import clock, room, split, table
from llava_sv.bench.cells import in_one_line, percent
from llava_sv.bench.feed import Feed
from llava_sv.bench.flags import (
    Job,
    check_outputs,
    finish,
    head_of,
    make_parser,
    read_job,
    title,
    within_memory,
)
from llava_sv.bench.matmul import MATMUL, describe, matmul_step, mfu
from llava_sv.bench.models import BenchBatch, make_batch, make_pair
from llava_sv.bench.peers import LLM_PEER, PEER, has_peer, make_stock_llama, make_stock_llava, stock_inputs
from llava_sv.bench.sizes import BenchSize
from llava_sv.errors import exit_on_user_error

EXAMPLE = """example:
  llava-sv bench train --size cpu --json train.json
  llava-sv bench train --size cpu --family llava_hd --markdown train.md
  llava-sv bench train --size gpu-8b --layers 8 --batch 2"""

REGIONS = ("llm", "model")
WARMUP = 2

Forward = Callable[[], torch.Tensor]
"""Runs one region forward; returns the loss."""


def our_forwards(model: Any, batch: BenchBatch) -> dict[str, Forward]:
    """Both regions of one of our models."""
    with torch.no_grad():
        spliced = model.prepare_inputs_labels_for_multimodal(batch.input_ids, labels=batch.labels, images=batch.images)
    embeds = spliced.inputs_embeds.detach().requires_grad_()

    def llm() -> torch.Tensor:
        return model(
            inputs_embeds=embeds,
            attention_mask=spliced.attention_mask,
            position_ids=spliced.position_ids,
            token_roles=spliced.token_roles,
            labels=spliced.labels,
            use_cache=False,
        ).loss

    def whole() -> torch.Tensor:
        return model(input_ids=batch.input_ids, labels=batch.labels, images=batch.images, use_cache=False).loss

    return {"llm": llm, "model": whole}


def llama_forwards(stock: Any, model: Any, batch: BenchBatch) -> dict[str, Forward]:
    """Region `llm` of transformers' language model, on what `model`, our dense one, splices of the batch."""
    with torch.no_grad():
        spliced = model.prepare_inputs_labels_for_multimodal(batch.input_ids, labels=batch.labels, images=batch.images)
    embeds = spliced.inputs_embeds.detach().requires_grad_()

    def llm() -> torch.Tensor:
        return stock(inputs_embeds=embeds, labels=spliced.labels, use_cache=False).loss

    return {"llm": llm}


def stock_forwards(stock: Any, inputs: dict[str, Any]) -> dict[str, Forward]:
    """Both regions of transformers' LLaVA."""
    shape = (*inputs["input_ids"].shape, stock.config.text_config.hidden_size)
    weight = stock.lm_head.weight
    embeds = torch.randn(shape, device=weight.device, dtype=weight.dtype, requires_grad=True)

    def llm() -> torch.Tensor:
        mask, labels = inputs["attention_mask"], inputs["labels"]
        return stock(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss

    def whole() -> torch.Tensor:
        return stock(**inputs, use_cache=False).loss

    return {"llm": llm, "model": whole}


def timed_step(model: torch.nn.Module, forward: Forward, device: torch.device) -> clock.Step:
    """Forward and backward, timed apart and together, and the CPU time of both; gradients are dropped untimed."""

    def step() -> dict[str, float]:
        used, start = clock.cpu_ms(), clock.now_ms(device)
        loss = forward()
        middle = clock.now_ms(device)
        loss.backward()
        end, used = clock.now_ms(device), clock.cpu_ms() - used
        model.zero_grad(set_to_none=True)
        return {"forward_ms": middle - start, "backward_ms": end - middle, "step_ms": end - start, "cpu_ms": used}

    return step


def weigh(model: torch.nn.Module, forward: Forward, device: torch.device) -> dict[str, Any]:
    """FLOPs and bytes of one step, counted outside the clock."""

    def once() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)

    flops = clock.count_flops(once)
    saved = clock.SavedBytes(model)
    with saved.watch():
        loss = forward()
    loss.backward()  # not watched: the watch would keep to the end what this lets go of
    del loss
    model.zero_grad(set_to_none=True)
    peak = clock.peak_bytes(once, device, model)
    return {"flops": flops, "activation_bytes": saved.total, "peak_bytes": peak}


Contenders = dict[str, tuple[torch.nn.Module, dict[str, Forward]]]
"""Name -> (model, its regions); a peer may lack one."""

Matmul = tuple[clock.Step, dict[str, Any]]


def bench_region(
    region: str, contenders: Contenders, device: torch.device, repeats: int, matmul: Matmul
) -> dict[str, Any]:
    """Every contender's medians, FLOPs and bytes in one region, and the savings of `skip` over `dense`."""
    present = {name: (model, forwards[region]) for name, (model, forwards) in contenders.items() if region in forwards}
    weights = {name: weigh(model, forward, device) for name, (model, forward) in present.items()}
    steps = {name: timed_step(model, forward, device) for name, (model, forward) in present.items()}
    measured = clock.rounds({**steps, MATMUL: matmul[0]}, repeats, WARMUP, f"train, {region}")
    squares = measured.pop(MATMUL)
    report: dict[str, Any] = {}
    for name, results in measured.items():
        used = mfu(weights[name]["flops"], results, matmul[1]["flops"], squares)
        report[name] = {**clock.medians(results), **weights[name], "mfu": used}
    dense, skip = measured["dense"], measured["skip"]
    report |= clock.savings(skip, dense, "step_ms", 1 - weights["skip"]["flops"] / weights["dense"]["flops"])
    report["cpu_time_saved"] = 1 - clock.median_ratio(skip, dense, "cpu_ms")
    report["matmul"] = describe(matmul[1], squares)
    report["peers"] = {}
    for peer in (PEER, LLM_PEER):
        if peer in measured:
            ratio = clock.median_ratio(dense, measured[peer], "step_ms")
            report["peers"][peer] = {**report.pop(peer), "dense_over_peer": ratio}
    return report


def make_contenders(
    size: BenchSize, dense: Any, skip: Any, device: torch.device, dtype: torch.dtype, with_peers: bool
) -> Contenders:
    """Both models in training mode, and the family's outside control."""
    batch = make_batch(size, device, dtype)
    contenders: Contenders = {}
    for name, model in (("dense", dense), ("skip", skip)):
        contenders[name] = (model.train(), our_forwards(model, batch))
    if with_peers and has_peer(size):
        stock = make_stock_llava(dense).train()
        contenders[PEER] = (stock, stock_forwards(stock, stock_inputs(batch, dense)))
    elif with_peers:
        llama = make_stock_llama(dense).train()
        contenders[LLM_PEER] = (llama, llama_forwards(llama, dense, batch))
    return contenders


def run(
    size: BenchSize,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    with_peers: bool = True,
    with_optimizer: bool = True,
) -> dict[str, Any]:
    """The whole report; its top level is the `llm` region, both regions are under `regions`."""
    clock.keep_freed_memory(device)
    dense, skip = make_pair(size, device, dtype)
    contenders = make_contenders(size, dense, skip, device, dtype, with_peers)
    matmul = matmul_step(device, dtype)
    regions = {region: bench_region(region, contenders, device, repeats, matmul) for region in REGIONS}
    models = {"dense": dense, "skip": skip}
    contenders.clear()  # peers, and their activations' inputs, make room for the optimizer's states
    optimizer = split.make_optimizer(skip, device) if with_optimizer else None
    parts = split.measure(models, Feed(size, device, dtype), optimizer, device, repeats)
    return {
        **regions["llm"],
        "region": "llm",
        "regions": regions,
        "split": parts,
        "environment": clock.environment(device, dtype),
    }


def measure(job: Job) -> dict[str, Any]:
    """The report of a job, its settings at the head. Raises `UserError` where it does not fit into memory."""
    needed = room.of_train(job.size, job.dtype, job.with_peers, job.device)
    room.check_room(needed, job.device, job.label, "train", job.with_peers)
    left_out = room.without_optimizer(needed, job.device)
    if left_out:
        print(left_out, file=sys.stderr)

    def work() -> dict[str, Any]:
        return run(job.size, job.device, job.dtype, job.repeats, job.with_peers, with_optimizer=not left_out)

    report = {**head_of(job), **within_memory(job, "train", work), "estimate_bytes": needed.total}
    report["split"]["optimizer_left_out"] = left_out
    return report


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    head = f"{'region':<8}{'':<20}{'step ms':>10}{'forward':>10}{'backward':>10}{'GFLOP':>10}{'MFU':>8}"
    lines = [title(report), head + f"{'kept MiB':>10}{'peak MiB':>10}"]
    for name, region in report["regions"].items():
        rows = {"dense": region["dense"], "skip": region["skip"], **region["peers"]}
        for who, row in rows.items():
            lines.append(
                f"{name:<8}{who:<20}{row['step_ms']:>10.1f}{row['forward_ms']:>10.1f}{row['backward_ms']:>10.1f}"
                f"{row['flops'] / 1e9:>10.1f}{row['mfu']:>8.1%}{row['activation_bytes'] / 2**20:>10.1f}"
                f"{row['peak_bytes'] / 2**20:>10.1f}"
            )
        low, high = region["time_saved_quartiles"]
        lines.append(
            f"{name:<8}time saved {region['time_saved']:.1%} (quartiles {low:.1%} to {high:.1%}); "
            f"FLOPs saved {region['flops_saved']:.1%}; time / FLOPs "
            f"{percent(region['time_saved_per_flops_saved'])}; "
            f"CPU time saved {region['cpu_time_saved']:.1%}; "
            f"squares of {region['matmul']['side']}: {region['matmul']['tflops']:.3g} TFLOP/s"
        )
        for who, row in region["peers"].items():
            lines.append(f"{name:<8}dense takes {row['dense_over_peer']:.3f} of {who}'s time")
    return "\n".join([*lines, *split.render(report["split"]), in_one_line(report["environment"])])


def main(argv: list[str]) -> int:
    """`llava-sv bench train ...`."""
    parser = make_parser("train", "Time a training step, dense against skipping, and split it into its parts.", EXAMPLE)
    args = parser.parse_args(argv)
    job = read_job(args)
    check_outputs(args, "--json", "--markdown")
    report = measure(job)
    return finish(args, report, render(report), table.render([report]))


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
