"""`llava-sv bench infer`: answers, dense against skipping, on the same weights: prefill, decode, end to end, apart.

A size arrives; times, FLOPs and KV-cache bytes leave. Contenders: dense; skip (skipped keys removed after prefill);
skip that keeps its whole cache; transformers' own LLaVA (family llava). Greedy, exactly `new_tokens` tokens an answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria

from llava_sv.bench import clock
from llava_sv.bench.models import BenchBatch, make_batch, make_pair
from llava_sv.bench.peers import PEER, has_peer, make_stock_llava, stock_inputs
from llava_sv.bench.sizes import BenchSize
from llava_sv.bench.train import finish, make_parser, read_args
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.model.language_model.skip_cache import cache_bytes

EXAMPLE = """example:
  llava-sv bench infer --size cpu --json infer.json
  llava-sv bench infer --size cpu --family cos"""

WARMUP = 1
KEPT = "skip_keeping_cache"
REGIONS = {"prefill": "prefill_ms", "decode": "decode_ms_per_token", "end_to_end": "end_to_end_ms"}
"""Region -> the figure it is measured by."""

Generate = Callable[..., Any]
"""Answers the batch with `max_new_tokens` tokens; `generate`'s output object leaves."""


class StepClock(StoppingCriteria):
    """Notes the time after each new token, and never stops."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(clock.now_ms(self.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def our_generate(model: Any, batch: BenchBatch, skip_kv: str | None) -> Generate:
    """One of our models, at a level of the skip KV-cache."""

    def run(new_tokens: int, **kwargs: Any) -> Any:
        return model.generate(
            batch.input_ids, images=batch.images, skip_kv=skip_kv, **_exactly(new_tokens), **kwargs
        )  # fmt: skip

    return run


def stock_generate(stock: Any, inputs: dict[str, Any]) -> Generate:
    """transformers' LLaVA."""
    prompt = {key: value for key, value in inputs.items() if key != "labels"}

    def run(new_tokens: int, **kwargs: Any) -> Any:
        return stock.generate(**prompt, **_exactly(new_tokens), **kwargs)

    return run


def _exactly(new_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }


def timed_answer(generate: Generate, new_tokens: int, device: torch.device) -> clock.Step:
    """One answer. Prefill: pixels to the first token, skipped keys already gone. Decode: each further token."""

    def step() -> dict[str, float]:
        steps = StepClock(device)
        start = clock.now_ms(device)
        generate(new_tokens, stopping_criteria=[steps])
        end = clock.now_ms(device)
        decode = (steps.times[-1] - steps.times[0]) / (new_tokens - 1)
        return {
            "prefill_ms": steps.times[0] - start,
            "decode_ms_per_token": decode,
            "end_to_end_ms": end - start,
        }

    return step


def weigh(generate: Generate, new_tokens: int, device: torch.device) -> dict[str, Any]:
    """FLOPs of an answer's parts, and the bytes of the KV cache that decoding starts from."""
    prefill = clock.count_flops(lambda: generate(1))
    whole = clock.count_flops(lambda: generate(new_tokens))
    cache = generate(1).past_key_values
    return {
        "flops": {"prefill": prefill, "decode": (whole - prefill) / (new_tokens - 1), "end_to_end": whole},
        "kv_bytes": cache_bytes(cache),
        "kv_tokens": cache.get_seq_length(),
        "peak_bytes": clock.peak_bytes(lambda: generate(new_tokens), device),
    }


def savings(region: str, measured: dict[str, Any], weights: dict[str, Any], name: str = "skip") -> dict[str, Any]:
    """Time and FLOPs that `name` saves over dense in one region."""
    key = REGIONS[region]
    time_saved = 1 - clock.median_ratio(measured[name], measured["dense"], key)
    flops_saved = 1 - weights[name]["flops"][region] / weights["dense"]["flops"][region]
    return {
        "time_saved": time_saved,
        "time_saved_quartiles": sorted(1 - r for r in clock.quartiles(measured[name], measured["dense"], key)),
        "flops_saved": flops_saved,
    }


@torch.inference_mode()
def run(
    size: BenchSize,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    with_peers: bool = True,
    new_tokens: int | None = None,
) -> dict[str, Any]:
    """The whole report; its top level is `end_to_end`, all three regions are under `regions`."""
    count = new_tokens or size.new_tokens
    clock.keep_freed_memory(device)
    with torch.inference_mode(False):
        dense, skip = make_pair(size, device, dtype)
        batch = make_batch(size, device, dtype)
        stock = make_stock_llava(dense).eval() if with_peers and has_peer(size) else None
    contenders = {
        "dense": our_generate(dense.eval(), batch, None),
        "skip": our_generate(skip.eval(), batch, None),
        KEPT: our_generate(skip, batch, "none"),
    }
    if stock is not None:
        contenders[PEER] = stock_generate(stock, stock_inputs(batch, dense))
    weights = {name: weigh(generate, count, device) for name, generate in contenders.items()}
    steps = {name: timed_answer(generate, count, device) for name, generate in contenders.items()}
    measured = clock.rounds(steps, repeats, WARMUP, "infer")
    rows: dict[str, Any] = {name: {**clock.medians(results), **weights[name]} for name, results in measured.items()}
    peers = {}
    if stock is not None:
        over = {r: clock.median_ratio(measured["dense"], measured[PEER], key) for r, key in REGIONS.items()}
        peers[PEER] = {**rows.pop(PEER), "dense_over_peer": over}
    regions = {region: savings(region, measured, weights) for region in REGIONS}
    return {
        **rows,
        **regions["end_to_end"],
        "kv_saved": 1 - rows["skip"]["kv_bytes"] / rows["dense"]["kv_bytes"],
        "regions": regions,
        "peers": peers,
        "new_tokens": count,
        "environment": clock.environment(device, dtype),
    }


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'':<20}{'prefill ms':>12}{'ms/token':>10}{'answer ms':>11}{'GFLOP':>9}{'KV tokens':>11}{'KV MiB':>8}"]
    rows = {name: report[name] for name in ("dense", "skip", KEPT)}
    for name, row in {**rows, **report["peers"]}.items():
        lines.append(
            f"{name:<20}{row['prefill_ms']:>12.1f}{row['decode_ms_per_token']:>10.2f}{row['end_to_end_ms']:>11.1f}"
            f"{row['flops']['end_to_end'] / 1e9:>9.1f}{row['kv_tokens']:>11}{row['kv_bytes'] / 2**20:>8.2f}"
        )
    for name, region in report["regions"].items():
        low, high = region["time_saved_quartiles"]
        lines.append(
            f"{name:<12}time saved {region['time_saved']:.1%} (quartiles {low:.1%} to {high:.1%}), "
            f"FLOPs saved {region['flops_saved']:.1%}"
        )
    for name, row in report["peers"].items():
        shares = ", ".join(f"{region} {share:.3f}" for region, share in row["dense_over_peer"].items())
        lines.append(f"dense over {name}: {shares}")
    lines.append(f"KV cache saved {report['kv_saved']:.1%}")
    return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in report["environment"].items())])


def main(argv: list[str]) -> int:
    """`llava-sv bench infer ...`."""
    parser = make_parser("infer", "Time answers, dense against skipping: prefill, decode, end to end.", EXAMPLE)
    parser.add_argument("--new-tokens", type=int, help="tokens an answer has (default: the size's)")
    args = parser.parse_args(argv)
    if args.new_tokens is not None and args.new_tokens < 2:
        raise UserError(f"--new-tokens {args.new_tokens}: at least 2 are needed, the first belongs to prefill")
    report = run(**read_args(args), new_tokens=args.new_tokens)
    return finish(args, report, render(report))


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
