"""`llava-sv bench infer`: answers, dense against skipping, on the same weights: prefill, decode, end to end, apart.

A size arrives; times, FLOPs and KV-cache bytes leave. Contenders: dense; skip (skipped keys removed after prefill);
skip that keeps its whole cache; transformers' own LLaVA (family llava), or its language model alone (decode of the
other families). Greedy, exactly so many tokens an answer; an answer's end to end at several lengths is read off one.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from llava_sv.bench import break_even, clock, room, table
from llava_sv.bench.cells import in_one_line, percent
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
from llava_sv.bench.models import BenchBatch, make_batch, make_pair
from llava_sv.bench.peers import LLM_PEER, PEER, has_peer, make_stock_llama, make_stock_llava, stock_inputs
from llava_sv.bench.sizes import BenchSize
from llava_sv.errors import exit_on_user_error
from llava_sv.model.language_model.skip_cache import cache_bytes, kept_after_prefill

EXAMPLE = """example:
  llava-sv bench infer --size cpu --json infer.json
  llava-sv bench infer --size cpu --family cos --new-tokens 16,64,256
  llava-sv bench infer --size cpu --batch 8 --text-tokens 1024 --markdown infer.md"""

WARMUP = 1
KEPT = "skip_keeping_cache"
REGIONS = table.FIGURES

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


def llama_generate(stock: Any, model: Any, batch: BenchBatch) -> Generate:
    """transformers' language model on what our dense one spliced, encoder and projector untimed."""
    with torch.no_grad():
        spliced = model.prepare_inputs_labels_for_multimodal(batch.input_ids, images=batch.images)
    prompt = {"inputs_embeds": spliced.inputs_embeds, "attention_mask": spliced.attention_mask.long()}

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


def length_key(new_tokens: int) -> str:
    """The name under which a round keeps an answer's end to end at this length."""
    return f"end_to_end_{new_tokens}_ms"


def timed_answer(generate: Generate, lengths: Sequence[int], device: torch.device) -> clock.Step:
    """One answer of the longest length. Prefill: pixels to the first token, skipped keys already gone. Decode: each
    further token. Shorter answers end where their last token comes."""
    longest = max(lengths)

    def step() -> dict[str, float]:
        steps = StepClock(device)
        start = clock.now_ms(device)
        generate(longest, stopping_criteria=[steps])
        end = clock.now_ms(device)
        decode = (steps.times[-1] - steps.times[0]) / (longest - 1)
        return {
            "prefill_ms": steps.times[0] - start,
            "decode_ms_per_token": decode,
            "end_to_end_ms": end - start,
            **{length_key(n): (end if n == longest else steps.times[n - 1]) - start for n in lengths},
        }

    return step


def flops_of_answer(counted: Sequence[int], new_tokens: int) -> float:
    """FLOPs of an answer of any length from those of 1, 2 and 3 tokens: each further token sees one key more."""
    first = counted[1] - counted[0]
    growth = counted[2] - counted[1] - first
    steps = new_tokens - 1
    return counted[0] + steps * first + growth * steps * (steps - 1) / 2


def weigh(generate: Generate, lengths: Sequence[int], device: torch.device, *models: Any) -> dict[str, Any]:
    """FLOPs of an answer's parts, and the bytes of the KV cache that decoding starts from."""
    counted = [clock.count_flops(functools.partial(generate, n)) for n in (1, 2, 3)]
    longest = max(lengths)
    whole = flops_of_answer(counted, longest)
    cache = generate(1).past_key_values
    return {
        "flops": {"prefill": counted[0], "decode": (whole - counted[0]) / (longest - 1), "end_to_end": whole},
        "flops_by_length": {str(n): flops_of_answer(counted, n) for n in lengths},
        "kv_bytes": cache_bytes(cache),
        "kv_tokens": cache.get_seq_length(),
        "peak_bytes": clock.peak_bytes(lambda: generate(longest), device, *models),
    }


def savings(region: str, measured: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """Time and FLOPs that skipping saves over dense in one region."""
    flops_saved = 1 - weights["skip"]["flops"][region] / weights["dense"]["flops"][region]
    return clock.savings(measured["skip"], measured["dense"], REGIONS[region], flops_saved)


def by_length(measured: dict[str, Any], weights: dict[str, Any], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """An answer's end to end at each length: medians in milliseconds, and what is saved."""
    dense, skip, rows = measured["dense"], measured["skip"], []
    for n in lengths:
        key = length_key(n)
        flops_saved = 1 - weights["skip"]["flops_by_length"][str(n)] / weights["dense"]["flops_by_length"][str(n)]
        rows.append(
            {
                "new_tokens": n,
                "dense_ms": clock.medians(dense)[key],
                "skip_ms": clock.medians(skip)[key],
                **clock.savings(skip, dense, key, flops_saved),
            }
        )
    return rows


def gain(measured: dict[str, Any], key: str) -> float:
    """Milliseconds that skipping saves over dense: median over rounds."""
    return statistics.median(d[key] - s[key] for d, s in zip(measured["dense"], measured["skip"]))


def check_kv(dense: Any, skip: Any, batch: BenchBatch, rows: dict[str, Any]) -> dict[str, Any]:
    """Whether the cache's bytes shrank to exactly the share of tokens that are kept, which the roles of the spliced
    sequence tell, not the cache. Shares are skipping over dense; `equal` compares whole numbers."""
    counts = {}
    for name, model in (("dense", dense), ("skip", skip)):
        level = model.config.skip_vision.skip_kv if model.config.skip_vision else "none"
        spliced = model.prepare_inputs_labels_for_multimodal(batch.input_ids, images=batch.images)
        counts[name] = int(kept_after_prefill(spliced.token_roles, level)[0].sum())
    bytes_dense, bytes_skip = rows["dense"]["kv_bytes"], rows["skip"]["kv_bytes"]
    return {
        "kept_tokens": counts["skip"],
        "all_tokens": counts["dense"],
        "tokens_share": counts["skip"] / counts["dense"],
        "bytes_share": bytes_skip / bytes_dense,
        "equal": bytes_skip * counts["dense"] == bytes_dense * counts["skip"],
    }


def make_peer(size: BenchSize, dense: Any, batch: BenchBatch) -> tuple[str, Generate, tuple[str, ...]]:
    """(name, answers, regions it can be compared in) of the family's outside control."""
    if has_peer(size):
        stock = make_stock_llava(dense).eval()
        return PEER, stock_generate(stock, stock_inputs(batch, dense)), tuple(REGIONS)
    return LLM_PEER, llama_generate(make_stock_llama(dense).eval(), dense, batch), ("decode",)


@torch.inference_mode()
def run(
    size: BenchSize,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    with_peers: bool = True,
    new_tokens: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """The whole report; its top level is `end_to_end` at the longest of `new_tokens`, all three regions are under
    `regions`, and every length under `lengths`."""
    given = size.new_tokens if new_tokens is None else new_tokens
    lengths = sorted({given} if isinstance(given, int) else set(given))
    clock.keep_freed_memory(device)
    with torch.inference_mode(False):
        dense, skip = make_pair(size, device, dtype, lengths[-1])
        batch = make_batch(size, device, dtype)
    contenders = {
        "dense": our_generate(dense.eval(), batch, None),
        "skip": our_generate(skip.eval(), batch, None),
        KEPT: our_generate(skip, batch, "none"),
    }
    peer: tuple[str, Generate, tuple[str, ...]] | None = None
    if with_peers:
        with torch.inference_mode(False):
            peer = make_peer(size, dense, batch)
        contenders[peer[0]] = peer[1]
    weights = {name: weigh(generate, lengths, device, dense, skip) for name, generate in contenders.items()}
    steps = {name: timed_answer(generate, lengths, device) for name, generate in contenders.items()}
    measured = clock.rounds(steps, repeats, WARMUP, "infer")
    rows: dict[str, Any] = {name: {**clock.medians(results), **weights[name]} for name, results in measured.items()}
    peers = {}
    if peer is not None:
        over = {r: clock.median_ratio(measured["dense"], measured[peer[0]], REGIONS[r]) for r in peer[2]}
        peers[peer[0]] = {**rows.pop(peer[0]), "dense_over_peer": over}
    regions = {region: savings(region, measured, weights) for region in REGIONS}
    return {
        **rows,
        **regions["end_to_end"],
        "kv_saved": 1 - rows["skip"]["kv_bytes"] / rows["dense"]["kv_bytes"],
        "kv_check": check_kv(dense, skip, batch, rows),
        "regions": regions,
        "lengths": by_length(measured, weights, lengths),
        "break_even": break_even.of_answer(gain(measured, "prefill_ms"), gain(measured, "decode_ms_per_token")),
        "peers": peers,
        "new_tokens": lengths[-1],
        "environment": clock.environment(device, dtype),
    }


def measure(job: Job) -> dict[str, Any]:
    """The report of a job, its settings at the head. Raises `UserError` where it does not fit into memory."""
    needed = room.of_infer(job.size, job.dtype, max(job.new_tokens), job.device)
    room.check_room(needed, job.device, job.label, "infer", job.with_peers)

    def work() -> dict[str, Any]:
        return run(job.size, job.device, job.dtype, job.repeats, job.with_peers, job.new_tokens)

    return {**head_of(job), **within_memory(job, "infer", work), "estimate_bytes": needed.total}


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    head = f"{'':<20}{'prefill ms':>12}{'ms/token':>10}{'answer ms':>11}{'GFLOP':>9}{'KV tokens':>11}{'KV MiB':>8}"
    lines = [f"{title(report)}, {report['new_tokens']} new tokens", head]
    rows = {name: report[name] for name in ("dense", "skip", KEPT)}
    for name, row in {**rows, **report["peers"]}.items():
        alone = "prefill" not in row.get("dense_over_peer", REGIONS)  # a language model alone: its prefill is no peer
        prefill, answer = (f"{row[key]:.1f}" if not alone else "-" for key in ("prefill_ms", "end_to_end_ms"))
        lines.append(
            f"{name:<20}{prefill:>12}{row['decode_ms_per_token']:>10.2f}{answer:>11}"
            f"{row['flops']['end_to_end'] / 1e9:>9.1f}{row['kv_tokens']:>11}{row['kv_bytes'] / 2**20:>8.2f}"
        )
    at_lengths = {f"{row['new_tokens']} tokens": row for row in report["lengths"]} if len(report["lengths"]) > 1 else {}
    for name, region in {**report["regions"], **at_lengths}.items():
        low, high = region["time_saved_quartiles"]
        lines.append(
            f"{name:<12}time saved {region['time_saved']:.1%} (quartiles {low:.1%} to {high:.1%}); "
            f"FLOPs saved {region['flops_saved']:.1%}; time / FLOPs "
            f"{percent(region['time_saved_per_flops_saved'])}"
        )
    lines.append(f"faster end to end: {break_even.in_words(report['break_even'])}")
    for name, row in report["peers"].items():
        shares = ", ".join(f"{region} {share:.3f}" for region, share in row["dense_over_peer"].items())
        lines.append(f"dense over {name}: {shares}")
    lines.append(f"KV cache saved {report['kv_saved']:.1%}; {table.kv_in_words(report['kv_check'])}")
    return "\n".join([*lines, in_one_line(report["environment"])])


def main(argv: list[str]) -> int:
    """`llava-sv bench infer ...`."""
    parser = make_parser("infer", "Time answers, dense against skipping: prefill, decode, end to end.", EXAMPLE)
    parser.add_argument(
        "--new-tokens", metavar="N,...", help="tokens an answer has; or several, 16,64,256 (default: the size's)"
    )
    args = parser.parse_args(argv)
    job = read_job(args, args.new_tokens, infer=True)
    check_outputs(args, "--json", "--markdown")
    report = measure(job)
    return finish(args, report, render(report), table.render([report]))


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
