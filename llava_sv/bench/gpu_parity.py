"""Whether a device's kernels compute what the plain computation does: `python -m llava_sv.bench.gpu_parity`.

`gpu_check` runs it; it needs no pytest. A device and kernels arrive; one result a check, family, precision and kernel
leaves. Both the path that users run and a plain one in the same precision (math kernel, FFN on all rows and a mask)
are compared with the plain one in float64: the tested path may be at most `SLACK` times as far from it as the plain
path is, and a few units of the precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llava_sv.bench import clock
from llava_sv.bench.gpu_kernels import KERNELS, UNAVAILABLE, Attention, Unavailable, using
from llava_sv.bench.parity_checks import CHECKS, Case, Errors
from llava_sv.bench.presets import FAMILIES
from llava_sv.bench.sizes import find_dtype, known_words
from llava_sv.errors import exit_on_user_error
from llava_sv.files import keep_existing, write_json

SLACK = 3.0
UNITS = 2
"""Units of the precision that are allowed beside."""

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Result:
    """One check. error, plain: the relative distances from float64 of the quantity `of` that came nearest to its limit.
    status: ok, failed, or unavailable, `note` saying why."""

    check: str
    family: str
    dtype: str
    kernel: str
    status: str
    of: str = ""
    error: float | None = None
    plain: float | None = None
    limit: float | None = None
    note: str = ""


def limit_of(plain: float, dtype: torch.dtype) -> float:
    """How far from float64 the tested path may be, the plain one being `plain` from it."""
    return SLACK * plain + UNITS * torch.finfo(dtype).eps


def judge(errors: Errors, dtype: torch.dtype) -> dict[str, Any]:
    """The quantity that came nearest to its limit. A figure that is not finite fails."""
    found = []
    for of, (error, plain) in errors.items():
        limit = limit_of(plain, dtype)
        share = error / limit if limit == limit and error == error else float("inf")
        found.append((share, of, error, plain, limit))
    share, of, error, plain, limit = max(found)
    finite = [value if abs(value) < float("inf") else None for value in (error, plain, limit)]
    status = "ok" if share <= 1 else "failed"
    note = "" if None not in finite else "not finite"
    return {"status": status, "of": of, "error": finite[0], "plain": finite[1], "limit": finite[2], "note": note}


def run_check(head: tuple[str, str, str, str], case: Case, attention: Attention) -> Result | None:
    """One check, whose names `head` gives; None where it says nothing of this family or precision."""
    try:
        errors = CHECKS[head[0]](case, attention)
    except Unavailable as error:
        return Result(*head, status=UNAVAILABLE, note=str(error))
    except Exception as error:  # one check must not lose the others
        return Result(*head, status="failed", note=_first_line(error))
    return None if errors is None else Result(*head, **judge(errors, case.dtype))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def run_kernel(kernel: str, case: Case, dtype: str) -> Iterator[Result]:
    """Every check of one family and precision under one kernel."""
    family = case.size.family
    try:
        with using(kernel, case.device, case.dtype, [case.dense, case.skip]) as attention:
            for check in CHECKS:
                result = run_check((check, family, dtype, kernel), case, attention)
                if result is not None:
                    yield result
    except Unavailable as error:
        yield Result("all", family, dtype, kernel, UNAVAILABLE, note=str(error))
    except Exception as error:  # nor one kernel the others
        yield Result("all", family, dtype, kernel, "failed", note=_first_line(error))


def run_all(device: torch.device, families: list[str], kernels: list[str]) -> Iterator[Result]:
    """Every check of every family, precision and kernel, as they come."""
    with _whole_float32():
        for family in families:
            for dtype in DTYPES:
                case = Case.make(family, device, find_dtype(dtype))
                for kernel in kernels:
                    yield from run_kernel(kernel, case, dtype)


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """float32 products with all of their bits: no TF32."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def describe(device: torch.device) -> dict[str, Any]:
    """On what it runs; bytes of memory of a GPU."""
    found = clock.environment(device, torch.float32)
    del found["dtype"], found["attention"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_bytes": properties.total_memory, "capability": f"{properties.major}.{properties.minor}"}
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_sv.bench.gpu_parity",
        description="Compare what this device's kernels compute with the same computed plainly, and in float64.",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="which, joined by commas (default: all)")
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"of attention: {', '.join(KERNELS)} (all)")
    parser.add_argument("--json", metavar="FILE", help="write the results here, each as soon as it is there")
    parser.add_argument("--overwrite", action="store_true", help="replace what --json names, where it exists")
    parser.add_argument("--describe", action="store_true", help="only say what device this is, as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Exit code 1 where a check failed."""
    args = parse(argv)
    families = known_words("--families", args.families, FAMILIES)
    kernels = known_words("--kernels", args.kernels, KERNELS)
    device = clock.pick_device(args.device)
    if args.describe:
        print(json.dumps(describe(device)))
        return 0
    keep_existing(args.json, args.overwrite)
    report: dict[str, Any] = {"environment": describe(device), "results": []}

    def note(result: Result) -> None:
        report["results"].append(asdict(result))
        figures = "" if result.error is None else f" {result.of}: {result.error:.2e} of {result.limit:.2e} allowed"
        head = f"{result.check}, {result.family}, {result.dtype}, {result.kernel}: {result.status}"
        print(f"{head}{figures} {result.note}".rstrip(), flush=True)
        if args.json:
            write_json(args.json, report)

    failed: list[Result] = []
    for result in run_all(device, families, kernels):
        note(result)
        failed += [result] if result.status == "failed" else []
    if failed:
        first = f"{failed[0].check}, {failed[0].family}, {failed[0].dtype}, {failed[0].kernel}"
        print(f"{len(failed)} of {len(report['results'])} checks failed, the first: {first}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
