"""`llava-sv eval`: a checkpoint and a benchmark in; accuracy, answers and (when asked) timings out.

Called by `llava_sv.cli`; the loop is `answer_loop`, the benchmarks are `tasks`, the timings are `timing`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_sv.bench.clock import environment
from llava_sv.errors import UserError
from llava_sv.eval.answer_loop import AnswerSettings, answer_questions, fingerprint
from llava_sv.eval.identity import identity, of_questions
from llava_sv.eval.retained import summary
from llava_sv.eval.tasks import TASKS, get_task
from llava_sv.eval.tasks.base import Question, Task, accuracy, chance
from llava_sv.eval.timing import make_prompts, measure, peak_memory_bytes
from llava_sv.files import write_json
from llava_sv.generation import Assistant, check_image_paths, load_for_inference
from llava_sv.model.token_groups import KV_LEVELS


@dataclass(frozen=True)
class EvalRequest:
    """One evaluation."""

    model_path: str
    task: str
    data_path: str | None = None
    answers_file: str | None = None
    limit: int | None = None
    timing_samples: int = 0
    timing_repeats: int = 5
    settings: AnswerSettings = field(default_factory=AnswerSettings)


def build_parser() -> argparse.ArgumentParser:
    """All flags of `llava-sv eval`."""
    parser = argparse.ArgumentParser(
        prog="llava-sv eval",
        description="Ask a checkpoint a benchmark's questions, and score the answers.",
        epilog="example: llava-sv eval --model-path checkpoints/tiny-skip --task toy --json result.json",
    )
    parser.add_argument(
        "--model-path", required=True, help="a checkpoint folder (a pretrained projector alone needs --model-base)"
    )
    parser.add_argument(
        "--model-base",
        help="language model of a lone projector, or base of LoRA adapters (default: theirs)",
    )
    parser.add_argument(
        "--vision-tower", help="folder of the encoder that the checkpoint names and does not hold (default: that name)"
    )
    parser.add_argument("--task", required=True, help=f"the benchmark: {', '.join(TASKS)}")
    parser.add_argument("--data-path", help="folder of the benchmark (default: the benchmark's own)")
    parser.add_argument(
        "--answers-file", help="JSONL of answers; a stopped run goes on from it (default: beside --json)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--blind", action="store_true", help="ask without the image: what the question alone gives away"
    )
    parser.add_argument("--skip-kv", choices=list(KV_LEVELS), help="skip KV-cache level (default: the checkpoint's)")
    parser.add_argument("--batch-size", type=int, default=16, help="questions a batch (default: %(default)s)")
    parser.add_argument(
        "--num-workers", type=int, default=0, help="processes that read images ahead (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: the benchmark's)")
    parser.add_argument("--limit", type=int, help="ask the first N questions only")
    parser.add_argument(
        "--timing", type=int, default=0, metavar="N", help="also time the answers to N questions (default: %(default)s)"
    )
    parser.add_argument("--timing-repeats", type=int, default=5, help="how often each is timed (default: %(default)s)")
    parser.add_argument("--conv-template", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2 (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--load-8bit", action="store_true", help="8-bit weights (bitsandbytes, CUDA)")
    parser.add_argument("--load-4bit", action="store_true", help="4-bit weights (bitsandbytes, CUDA)")
    return parser


def load_questions(request: EvalRequest, task: Task) -> list[Question]:
    """The benchmark's questions, every image checked to exist."""
    questions = task.load(Path(request.data_path or task.default_data_path))
    if request.limit is not None:
        questions = questions[: request.limit]
    if not request.settings.blind:
        check_image_paths(sorted({str(path) for question in questions for path in question.images}))
    return questions


def evaluate(assistant: Assistant, request: EvalRequest, questions: list[Question]) -> dict[str, Any]:
    """Answer, score and time: the result as it goes to JSON."""
    task = get_task(request.task)
    settings = request.settings
    made_by = fingerprint(request.model_path, request.task, settings)
    path = Path(request.answers_file or _default_answers_file(request))
    answers, seconds = answer_questions(assistant, task, questions, path, settings, made_by)
    made_with = generation_of(assistant, task, settings)
    result = {
        "task": request.task,
        "model_path": request.model_path,
        "blind": settings.blind,
        "skip_kv": settings.skip_kv,
        **accuracy(task, questions, answers),
        "questions_per_category": dict(Counter(question.category for question in questions)),
        "chance": chance(questions),
        "limit": request.limit,
        "questions_sha256": of_questions(questions),
        "checkpoint": identity(request.model_path),
        "generation": made_with,
        "environment": environment(assistant.device, assistant.model.dtype) | {"attention": made_with["attention"]},
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(assistant.device),
        "answers_file": str(path),
    }
    retained = summary(assistant.model, path)
    if retained is not None:
        result["retained"] = retained
    if request.timing_samples:
        prompts = make_prompts(assistant, task, questions, request.timing_samples, settings.blind)
        measured = measure({"it": (assistant, prompts)}, settings.skip_kv, request.timing_repeats)
        result["timing"] = measured["it"].to_dict()
    return result


def generation_of(assistant: Assistant, task: Task, settings: AnswerSettings) -> dict[str, Any]:
    """How answers were made; `skip_kv` is the level in use, the checkpoint's own where none was asked for."""
    skip = assistant.model.config.skip_vision
    return {
        "do_sample": False,
        "max_new_tokens": settings.max_new_tokens or task.max_new_tokens,
        "batch_size": settings.batch_size,
        "skip_kv": "none" if skip is None else settings.skip_kv or skip.skip_kv,
        "attention": str(assistant.model.config._attn_implementation),
        "quantized": bool(getattr(assistant.model, "is_quantized", False)),
    }


def _default_answers_file(request: EvalRequest) -> str:
    kind = request.task + ("-blind" if request.settings.blind else "")
    return f"playground/eval/{Path(request.model_path).name}/{kind}.answers.jsonl"


def render(result: dict[str, Any]) -> str:
    """The table a person reads."""
    by_chance = result["chance"]
    lines = [f"{'category':<12} {'accuracy':>8} {'chance':>8}"]
    for category, share in result["per_category"].items():
        lines.append(f"{category:<12} {share:>8.1%} {by_chance['per_category'][category]:>8.1%}")
    lines.append(
        f"{'all':<12} {result['accuracy']:>8.1%} {by_chance['accuracy']:>8.1%}   {result['questions']} questions"
    )
    if "retained" in result:
        found = result["retained"]
        lines.append(
            f"retained tokens an image {found['mean']:.1f} on average ({found['least']} to {found['most']}), "
            f"budget {found['budget']}"
        )
    if "timing" in result:
        timing = result["timing"]
        lines.append(
            f"first token {timing['time_to_first_token_ms']:.1f} ms, "
            f"then {timing['decode_ms_per_token']:.2f} ms a token; "
            f"KV cache {timing['kv_bytes_prefill']:,} bytes after prefill, {timing['kv_bytes']:,} while decoding"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """`llava-sv eval ...`."""
    args = build_parser().parse_args(argv)
    for name in ("batch_size", "timing_repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    answers_file = args.answers_file or (args.json and str(Path(args.json).with_suffix(".answers.jsonl")))
    request = EvalRequest(
        model_path=args.model_path,
        task=args.task,
        data_path=args.data_path,
        answers_file=answers_file,
        limit=args.limit,
        timing_samples=args.timing,
        timing_repeats=args.timing_repeats,
        settings=AnswerSettings(args.batch_size, args.blind, args.skip_kv, args.max_new_tokens, args.num_workers),
    )
    questions = load_questions(request, get_task(request.task))
    assistant = load_for_inference(
        args.model_path,
        args.model_base,
        conv_template=args.conv_template,
        device=args.device,
        vision_tower=args.vision_tower,
        attn_implementation=args.attn_implementation,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
    )
    result = evaluate(assistant, request, questions)
    print(render(result))
    if args.json:
        write_json(args.json, result)
        print(f"written: {args.json}, answers in {result['answers_file']}")
    return 0
