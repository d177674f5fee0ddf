"""How long checkpoints take to answer, and how much their KV cache weighs. Called by `eval.cli` and the quickstart.

Checkpoints and a few prompts arrive; medians over repeats leave. Times are wall-clock, in milliseconds; bytes are those
of the cache's storage. One prompt at a time, as in chat. Several checkpoints take turns, repeat by repeat, so that a
machine that is busy for a moment is busy for all of them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_sv.bench.clock import environment
from llava_sv.errors import exit_on_user_error
from llava_sv.eval.identity import identity
from llava_sv.eval.tasks import get_task
from llava_sv.eval.tasks.base import Question, Task
from llava_sv.files import write_json
from llava_sv.generation import Assistant, PromptBatch, generate, load_for_inference, make_batch, user_turn
from llava_sv.mm_utils import load_image
from llava_sv.model.language_model.skip_cache import cache_bytes

NEW_TOKENS = 33
"""Length of each timed answer: one first token and 32 further ones."""


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
    samples: int
    repeats: int
    new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Runs:
    """What one checkpoint's runs gave so far."""

    first_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    prefill_bytes: list[int] = field(default_factory=list)
    kept_bytes: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def make_prompts(
    assistant: Assistant, task: Task, questions: list[Question], samples: int, blind: bool = False
) -> list[PromptBatch]:
    """`samples` prompts, spread evenly over the questions."""
    prompts = []
    for question in questions[:: max(len(questions) // samples, 1)][:samples]:
        images = [] if blind else [load_image(path) for path in question.images]
        prompts.append(make_batch(assistant, [[user_turn(task.prompt(question), len(images))]], [images]))
    return prompts


def measure(
    contestants: dict[str, tuple[Assistant, list[PromptBatch]]],
    skip_kv: str | None = None,
    repeats: int = 5,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Timing]:
    """Time greedy answers of exactly `new_tokens` tokens to each prompt, after one unmeasured round.

    contestants: name -> (checkpoint, its prompts), as many prompts each. Returns name -> `Timing`.
    """
    counts = {len(prompts) for _, prompts in contestants.values()}
    if len(counts) != 1 or 0 in counts or new_tokens < 2 or repeats < 1:
        raise ValueError(f"cannot time prompts {sorted(counts)}, {repeats} repeats, {new_tokens} new tokens")
    runs = {name: _Runs() for name in contestants}
    for index in range(counts.pop()):
        for name, (assistant, prompts) in contestants.items():
            _read_cache(assistant, prompts[index], skip_kv, runs[name])
            _runner(assistant, prompts[index], skip_kv, new_tokens)()
        for _ in range(repeats):
            for name, (assistant, prompts) in contestants.items():
                on_cuda = assistant.device.type == "cuda"
                first = _milliseconds(_runner(assistant, prompts[index], skip_kv, 1), on_cuda)
                whole = _milliseconds(_runner(assistant, prompts[index], skip_kv, new_tokens), on_cuda)
                runs[name].first_ms.append(first)
                runs[name].decode_ms.append((whole - first) / (new_tokens - 1))
    return {
        name: Timing(
            time_to_first_token_ms=statistics.median(run.first_ms),
            decode_ms_per_token=statistics.median(run.decode_ms),
            kv_bytes_prefill=round(statistics.median(run.prefill_bytes)),
            kv_bytes=round(statistics.median(run.kept_bytes)),
            prompt_tokens=round(statistics.median(run.lengths)),
            samples=len(contestants[name][1]),
            repeats=repeats,
            new_tokens=new_tokens,
        )
        for name, run in runs.items()
    }


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: the most that tensors took since the start; CPU: the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _read_cache(assistant: Assistant, prompt: PromptBatch, skip_kv: str | None, runs: _Runs) -> None:
    """Length and bytes of the cache after prefill, and bytes of what is left of it when decoding begins."""
    whole = _runner(assistant, prompt, "none", 1)().past_key_values
    runs.prefill_bytes.append(cache_bytes(whole))
    runs.lengths.append(whole.get_seq_length())
    runs.kept_bytes.append(cache_bytes(_runner(assistant, prompt, skip_kv, 1)().past_key_values))


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


def main(argv: list[str]) -> int:
    """`python -m llava_sv.eval.timing ...`: checkpoints side by side."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_sv.eval.timing",
        description="Time two checkpoints' answers side by side.",
        epilog="example: python -m llava_sv.eval.timing --dense checkpoints/tiny-dense --skip checkpoints/tiny-skip "
        "--task toy --json timing.json",
    )
    parser.add_argument("--dense", required=True, help="checkpoint")
    parser.add_argument("--skip", required=True, help="checkpoint")
    parser.add_argument("--task", default="toy", help="benchmark to take questions from")
    parser.add_argument("--data-path", help="folder of the benchmark (default: the benchmark's own)")
    parser.add_argument("--samples", type=int, default=6, help="questions")
    parser.add_argument("--repeats", type=int, default=7, help="times that each is answered")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the result goes")
    args = parser.parse_args(argv)
    task = get_task(args.task)
    questions = task.load(Path(args.data_path or task.default_data_path))
    contestants = {}
    for name in ("dense", "skip"):
        assistant = load_for_inference(getattr(args, name))
        contestants[name] = (assistant, make_prompts(assistant, task, questions, args.samples))
    result = {name: timing.to_dict() for name, timing in measure(contestants, repeats=args.repeats).items()}
    paths = {"dense": args.dense, "skip": args.skip}
    about = {
        "checkpoints": {name: {"model_path": path, **(identity(path) or {})} for name, path in paths.items()},
        "environment": environment(assistant.device, assistant.model.dtype),
    }
    write_json(args.json, result | about)
    for name, timing in result.items():
        print(
            f"{name:<6} first token {timing['time_to_first_token_ms']:.1f} ms, "
            f"then {timing['decode_ms_per_token']:.2f} ms a token, KV cache {timing['kv_bytes']:,} bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
