"""How long a checkpoint takes to answer, and how much its KV cache weighs. Called by `eval.cli` and the report.

A checkpoint and a few conversations arrive; medians over repeats leave. Times are wall-clock, in milliseconds; bytes
are those of the cache's storage. One prompt at a time, as in chat.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llava_sv.generation import Assistant, PromptBatch, generate
from llava_sv.model.language_model.skip_cache import cache_bytes


@dataclass(frozen=True)
class Timing:
    """Medians over samples and repeats."""

    time_to_first_token_ms: float
    """From pixels on the device to the first new token: encoder, projector, prefill."""
    decode_ms_per_token: float
    """Each further token."""
    kv_bytes_prefill: int
    """KV cache after prefill, nothing removed."""
    kv_bytes: int
    """KV cache that decoding starts from, skipped tokens removed."""
    prompt_tokens: int
    """Length of the spliced prompt: text and visual tokens."""
    peak_memory_bytes: int
    """CUDA: the most that tensors took during the measurement; CPU: the process's largest resident set."""
    samples: int
    repeats: int
    new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    assistant: Assistant, prompts: list[PromptBatch], skip_kv: str | None = None, repeats: int = 5, new_tokens: int = 33
) -> Timing:
    """Time greedy answers of exactly `new_tokens` tokens to each prompt, after one unmeasured round."""
    if not prompts or new_tokens < 2 or repeats < 1:
        raise ValueError(f"nothing to time: {len(prompts)} prompts, {repeats} repeats, {new_tokens} new tokens")
    on_cuda = assistant.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(assistant.device)
    first_ms, decode_ms, prefill_bytes, kept_bytes, lengths = [], [], [], [], []
    for prompt in prompts:
        run_first = _runner(assistant, prompt, skip_kv, 1)
        run_all = _runner(assistant, prompt, skip_kv, new_tokens)
        run_all()
        for _ in range(repeats):
            first = _milliseconds(run_first, on_cuda)
            first_ms.append(first)
            decode_ms.append((_milliseconds(run_all, on_cuda) - first) / (new_tokens - 1))
        whole = _runner(assistant, prompt, "none", 1)().past_key_values
        prefill_bytes.append(cache_bytes(whole))
        lengths.append(whole.get_seq_length())
        kept_bytes.append(cache_bytes(run_first().past_key_values))
    if on_cuda:
        peak = torch.cuda.max_memory_allocated(assistant.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Timing(
        time_to_first_token_ms=statistics.median(first_ms),
        decode_ms_per_token=statistics.median(decode_ms),
        kv_bytes_prefill=round(statistics.median(prefill_bytes)),
        kv_bytes=round(statistics.median(kept_bytes)),
        prompt_tokens=round(statistics.median(lengths)),
        peak_memory_bytes=peak,
        samples=len(prompts),
        repeats=repeats,
        new_tokens=new_tokens,
    )


def _runner(assistant: Assistant, prompt: PromptBatch, skip_kv: str | None, new_tokens: int) -> Callable[[], Any]:
    """A call that makes exactly `new_tokens` new tokens and gives transformers' output object, cache included."""

    def run() -> Any:
        return generate(
            assistant,
            prompt,
            skip_kv=skip_kv,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )

    return run


def _milliseconds(run: Callable[[], Any], on_cuda: bool) -> float:
    if on_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if on_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000
