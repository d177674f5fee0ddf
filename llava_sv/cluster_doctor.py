"""`llava-sv doctor --cluster`: the processes of a run, started as training would be, compare what they have.

`CHECK_CLUSTER=1 bash scripts/v1_5/finetune_skip.sh` runs it with the launch, nodes and flags of that training in the
training's place. Every rank reports; rank 0 prints one table, and writes it as JSON with `--json FILE`. Exit code 2,
with a line for each, where something would go wrong: other data or versions, clocks apart, an OUTPUT not shared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from llava_sv.cluster import agree, roll_call
from llava_sv.cluster.ending import in_order
from llava_sv.constants import GIB, MIB
from llava_sv.errors import UserError, exit_on_any_trouble
from llava_sv.files import write_json
from llava_sv.train import preflight

MAX_CLOCK_SECONDS = 5.0
"""Clocks further apart confuse the order of checkpoints and logs on shared storage."""

_ROUNDS = 5
_SHARED_WITHIN = 10.0


def main(argv: list[str]) -> int:
    """`llava-sv doctor --cluster [--json FILE] [--training SCRIPT FLAGS...]`; every rank runs it, and leaves with its
    exit code."""
    return in_order(lambda: exit_on_any_trouble(_compare, argv))


def _compare(argv: list[str]) -> int:
    own, training = argv, []
    if "--training" in argv:
        at = argv.index("--training")
        own, training = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(prog="llava-sv doctor --cluster", description="Compare the processes of a run.")
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON, on rank 0")
    parser.add_argument("--max-clock-seconds", type=float, default=MAX_CLOCK_SECONDS, help="clocks may differ by this")
    args = parser.parse_args(own)
    roll_call.meet_ranks()
    device = _start(training)
    try:
        report = examine(training, device, args.max_clock_seconds)
    finally:
        agree.leave(together=False)
    if int(os.environ.get("RANK", "0")) == 0:
        print(render(report), flush=True)
        for problem in report["problems"]:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        if args.json:
            write_json(args.json, report)
    return 2 if report["problems"] else 0


def _start(training: list[str]) -> Any:
    """The process group on the devices that training would use; the device of this rank."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available() and not preflight.wants_cpu(training):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local} on {agree.who()['host']}, which has {torch.cuda.device_count()} GPUs: lower NPROC"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=roll_call.join_timeout()))
    return device


def examine(training: list[str], device: Any, max_clock_seconds: float) -> dict[str, Any]:
    """The report: `world`, `ranks` (a dict each), `all_reduce`, `output`, `problems`, `ok`. The same on every rank."""
    flags = preflight.read_flags(training, (*preflight.NEEDED, "output_dir", "mm_family", "eval_data_path"))
    facts = agree.facts(preflight.shared_inputs(flags), whole=True)
    problem = "; ".join(preflight.missing_inputs(training[1:])) if training else ""
    row = {**agree.who(), **machine(device), "facts": facts, "problem": problem}
    if not flags.get("output_dir"):
        output, seen = "", True
    else:
        output, seen = flags["output_dir"], shared(Path(flags["output_dir"]))
    rows = agree.gather({**row, "sees_output": seen})
    for one, offset in zip(rows, clock_offsets(device)):
        one["clock_offset_seconds"] = round(offset, 4)
    problems = agree.same_number(rows) + agree.differences(rows)
    problems += [f"{one['problem']} on {agree.ranks_in_words([one])}" for one in rows if one["problem"]]
    problems += _clock_problems(rows, max_clock_seconds)
    blind = [one for one in rows if not one["sees_output"]]
    if blind:
        problems.append(
            f"--output_dir {output} is not shared: what rank 0 ({rows[0]['host']}) writes there is not seen by "
            f"{agree.ranks_in_words(blind)}; {agree.MEND['output']}"
        )
    return {
        "world": len(rows),
        "ranks": rows,
        "all_reduce": bandwidth(device),
        "output": output,
        "problems": problems,
        "ok": not problems,
    }


def _clock_problems(rows: list[dict[str, Any]], most: float) -> list[str]:
    late = [row for row in rows if abs(row["clock_offset_seconds"]) > most]
    by_host = {row["host"]: row for row in reversed(late)}
    return [
        f"the clock of {row['host']} (rank {row['rank']}) is {abs(row['clock_offset_seconds']):.1f} s "
        f"{'ahead of' if row['clock_offset_seconds'] > 0 else 'behind'} that of {rows[0]['host']} (rank 0), more than "
        f"{most:g} s; set both by NTP"
        for row in reversed(by_host.values())
    ]


def machine(device: Any) -> dict[str, Any]:
    """Memory, GPU and commit of this rank: shown, and free to differ. `gpu_id`: two ranks must not share one."""
    import psutil
    import torch

    found: dict[str, Any] = {"memory_free_gib": round(psutil.virtual_memory().available / GIB, 1)}
    found |= {"commit": commit(), "gpu": "none", "gpu_free_gib": 0.0, "gpu_id": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_free_gib": round(torch.cuda.mem_get_info(device)[0] / GIB, 1)}
        found["gpu_id"] = str(getattr(properties, "uuid", "")) or None
    return found


def commit() -> str:
    """The repository's commit, with `+` where files differ from it; `none` outside git."""
    root = str(Path(__file__).parents[1])
    try:
        said = [
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=30)
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    if said[0].returncode != 0:
        return "none"
    return said[0].stdout.strip() + ("+" if said[1].stdout.strip() else "")


def shared(output: Path) -> bool:
    """Whether this rank sees a file that rank 0 writes in `output`. All ranks call it."""
    rank = int(os.environ.get("RANK", "0"))
    made, name, error = False, "", ""
    if rank == 0:
        name = f".seen-by-all-{uuid.uuid4().hex}"
        made = not output.exists()
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / name).write_text("llava-sv doctor --cluster\n", encoding="utf-8")
        except OSError as refused:
            error = f"--output_dir {output}: rank 0 cannot write there ({refused.strerror})"
    name, error = agree.gather((name, error))[0]
    if error:
        raise UserError(error)
    deadline = time.monotonic() + _SHARED_WITHIN
    seen = _there(output, name)
    while not seen and time.monotonic() < deadline:  # network storage may show a new file late
        time.sleep(0.5)
        seen = _there(output, name)
    agree.gather(seen)
    if rank == 0:
        (output / name).unlink(missing_ok=True)
        if made and not any(output.iterdir()):
            output.rmdir()
    return seen


def _there(folder: Path, name: str) -> bool:
    try:
        return name in os.listdir(folder)
    except OSError:
        return False


def clock_offsets(device: Any) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, from the fastest of a few round trips."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return [0.0]
    world, rank = dist.get_world_size(), dist.get_rank()
    offsets = torch.zeros(world, dtype=torch.float64, device=device)
    for other in range(1, world):
        best = float("inf")
        for _ in range(_ROUNDS if rank in (0, other) else 0):
            clock = torch.zeros(1, dtype=torch.float64, device=device)
            if rank == 0:
                sent = time.time()
                dist.send(clock, other)
                dist.recv(clock, other)
                theirs, back = clock.item(), time.time()
                if back - sent < best:
                    best = back - sent
                    offsets[other] = theirs - (sent + back) / 2
            else:
                dist.recv(clock, 0)
                clock.item()
                clock.fill_(time.time())
                dist.send(clock, 0)
    dist.broadcast(offsets, 0)
    return offsets.tolist()


def bandwidth(device: Any) -> dict[str, Any] | None:
    """An all-reduce over all ranks, timed: `bytes`, `seconds` (the median), `gb_per_s`, `bus_gb_per_s`, `backend`.

    gb_per_s: bytes / seconds. bus_gb_per_s: x 2(n-1)/n, what a ring sends over each link. None for one process.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return None
    size = (256 if device.type == "cuda" else 32) * MIB
    block = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(_ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(block)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        block.fill_(1.0)
    slowest = torch.tensor(sorted(seconds[1:])[_ROUNDS // 2], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    took, world = slowest.item(), dist.get_world_size()
    return {
        "bytes": size,
        "seconds": round(took, 6),
        "gb_per_s": round(size / took / 1e9, 3),
        "bus_gb_per_s": round(size / took / 1e9 * 2 * (world - 1) / world, 3),
        "backend": dist.get_backend(),
        "rounds": _ROUNDS,
    }


def render(report: dict[str, Any]) -> str:
    """The page that rank 0 prints."""
    rows = report["ranks"]
    head = (
        "rank",
        "host",
        "GPU",
        "GPU GiB free",
        "GiB free",
        "clock s",
        "commit",
        "torch",
        "transformers",
        "deepspeed",
    )
    body = [
        (
            f"{row['rank']}",
            row["host"],
            row["gpu"],
            f"{row['gpu_free_gib']:g}" if row["gpu"] != "none" else "-",
            f"{row['memory_free_gib']:g}",
            f"{row['clock_offset_seconds']:+.3f}",
            row["commit"],
            *(row["facts"][name] for name in ("torch", "transformers", "deepspeed")),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body)]
    nodes = len({row["host"] for row in rows})
    lines = [f"{report['world']} processes on {nodes} node{'s' * (nodes > 1)}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *body)]
    for name in ("python", "code", "data", "model"):
        values = list(dict.fromkeys(row["facts"][name] for row in rows if name in row["facts"]))
        if values:
            lines.append(f"{name:<11} {values[0] if len(values) == 1 else 'DIFFERS: ' + ' | '.join(values)}")
    if report["output"]:
        seen = "seen by all ranks" if all(row["sees_output"] for row in rows) else "NOT seen by all ranks"
        lines.append(f"{'output':<11} {report['output']}: {seen}")
    speed = report["all_reduce"]
    if speed:
        lines.append(
            f"{'all-reduce':<11} {speed['gb_per_s']:g} GB/s, on the bus of a ring {speed['bus_gb_per_s']:g} GB/s: "
            f"{speed['bytes'] // MIB} MiB of float32, {speed['backend']}, median of {speed['rounds']}, slowest rank"
        )
    lines.append("All processes agree." if report["ok"] else f"{len(report['problems'])} to mend")
    return "\n".join(lines)
