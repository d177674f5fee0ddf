"""`llava-sv bench train`: a training step, dense against skipping, on the same weights and kernels.

A size arrives; times, FLOPs and bytes of two regions leave. `llm`: decoder, head and loss on a spliced batch. `model`:
all of it, encoder, projector, selection, merge, summaries and splice included. Forward and backward, no optimizer step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from llava_sv.bench import clock
from llava_sv.bench.models import BenchBatch, make_batch, make_pair
from llava_sv.bench.peers import PEER, has_peer, make_stock_llava, stock_inputs
from llava_sv.bench.presets import FAMILIES
from llava_sv.bench.sizes import DTYPE_NAMES, SIZES, BenchSize, find_dtype, find_size
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import write_json

EXAMPLE = """example:
  llava-sv bench train --size cpu --json train.json
  llava-sv bench train --size cpu --family llava_hd"""

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
        forward().backward()
    model.zero_grad(set_to_none=True)
    return {"flops": flops, "activation_bytes": saved.total, "peak_bytes": clock.peak_bytes(once, device)}


def bench_region(
    region: str, contenders: dict[str, tuple[torch.nn.Module, dict[str, Forward]]], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Every contender's medians, FLOPs and bytes in one region, and the savings of `skip` over `dense`."""
    weights = {name: weigh(model, forwards[region], device) for name, (model, forwards) in contenders.items()}
    steps = {name: timed_step(model, forwards[region], device) for name, (model, forwards) in contenders.items()}
    measured = clock.rounds(steps, repeats, WARMUP, f"train, {region}")
    report: dict[str, Any] = {name: {**clock.medians(results), **weights[name]} for name, results in measured.items()}
    dense, skip = measured["dense"], measured["skip"]
    time_saved = 1 - clock.median_ratio(skip, dense, "step_ms")
    flops_saved = 1 - weights["skip"]["flops"] / weights["dense"]["flops"]
    report["time_saved"] = time_saved
    report["time_saved_quartiles"] = sorted(1 - ratio for ratio in clock.quartiles(skip, dense, "step_ms"))
    report["flops_saved"] = flops_saved
    report["time_saved_per_flops_saved"] = time_saved / flops_saved
    report["cpu_time_saved"] = 1 - clock.median_ratio(skip, dense, "cpu_ms")
    report["peers"] = {}
    if PEER in measured:
        ratio = clock.median_ratio(dense, measured[PEER], "step_ms")
        report["peers"][PEER] = {**report.pop(PEER), "dense_over_peer": ratio}
    return report


def run(
    size: BenchSize, device: torch.device, dtype: torch.dtype, repeats: int, with_peers: bool = True
) -> dict[str, Any]:
    """The whole report; its top level is the `llm` region, both regions are under `regions`."""
    clock.keep_freed_memory(device)
    dense, skip = make_pair(size, device, dtype)
    batch = make_batch(size, device, dtype)
    contenders: dict[str, tuple[torch.nn.Module, dict[str, Forward]]] = {}
    for name, model in (("dense", dense), ("skip", skip)):
        contenders[name] = (model.train(), our_forwards(model, batch))
    if with_peers and has_peer(size):
        stock = make_stock_llava(dense).train()
        contenders[PEER] = (stock, stock_forwards(stock, stock_inputs(batch, dense)))
    regions = {region: bench_region(region, contenders, device, repeats) for region in REGIONS}
    return {**regions["llm"], "region": "llm", "regions": regions, "environment": clock.environment(device, dtype)}


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    head = f"{'region':<8}{'':<20}{'step ms':>10}{'forward':>10}{'backward':>10}{'GFLOP':>10}{'kept MiB':>10}"
    lines = [head]
    for name, region in report["regions"].items():
        rows = {"dense": region["dense"], "skip": region["skip"], **region["peers"]}
        for who, row in rows.items():
            lines.append(
                f"{name:<8}{who:<20}{row['step_ms']:>10.1f}{row['forward_ms']:>10.1f}{row['backward_ms']:>10.1f}"
                f"{row['flops'] / 1e9:>10.1f}{row['activation_bytes'] / 2**20:>10.1f}"
            )
        low, high = region["time_saved_quartiles"]
        lines.append(
            f"{name:<8}time saved {region['time_saved']:.1%} (quartiles {low:.1%} to {high:.1%}) of "
            f"{region['flops_saved']:.1%} FLOPs saved: {region['time_saved_per_flops_saved']:.1%}; "
            f"CPU time saved {region['cpu_time_saved']:.1%}"
        )
        for who, row in region["peers"].items():
            lines.append(f"{name:<8}dense takes {row['dense_over_peer']:.3f} of {who}'s time")
    return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in report["environment"].items())])


def make_parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The flags that both benchmarks share."""
    parser = argparse.ArgumentParser(
        prog=f"llava-sv bench {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", default="cpu", help=f"{', '.join(SIZES)} (default cpu)")
    parser.add_argument("--family", default="llava", help=f"{', '.join(FAMILIES)} (default llava)")
    parser.add_argument("--repeats", type=int, help="rounds that are measured (default: the size's)")
    parser.add_argument("--dtype", default="bf16", help=f"{', '.join(DTYPE_NAMES)} (default bf16)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers' own LLaVA out (family llava)")
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    return parser


def read_args(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `run`, checked."""
    size = find_size(args.size, args.family)
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: at least one round is needed")
    return {
        "size": size,
        "device": clock.pick_device(args.device),
        "dtype": find_dtype(args.dtype),
        "repeats": args.repeats or size.repeats,
        "with_peers": not args.no_peers,
    }


def finish(args: argparse.Namespace, report: dict[str, Any], text: str) -> int:
    """Print the report, write it where asked."""
    report = {"size": args.size, "family": args.family, **report}
    print(text)
    if args.json:
        write_json(args.json, report)
    return 0


def main(argv: list[str]) -> int:
    """`llava-sv bench train ...`."""
    parser = make_parser("train", "Time a training step (forward and backward), dense against skipping.", EXAMPLE)
    args = parser.parse_args(argv)
    report = run(**read_args(args))
    return finish(args, report, render(report))


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
