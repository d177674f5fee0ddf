"""How fast a run is, and what holds it up: waiting for data, and FLOPs against the device's peak.

`llava_trainer` times the loader through `timed` and asks `rates` at each log; `train.finish` puts `summary` into
train_summary.json. Wall-clock seconds, FLOPs and shares.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from llava_sv.errors import UserError

PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "B100": 1750.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}
"""Dense bfloat16 TFLOP/s by a part of the device's name, as the makers give them (no sparsity)."""

MEASURE = "measure"
"""`--peak_tflops measure`: time a matrix product on this device instead."""

WAITS = 0.05
"""Share of waiting from which a hint is worth a line."""

ENOUGH_STEPS = 20
"""Steps from which a share of waiting says something: the first waits for workers to start."""


def timed(batches: Iterator[Any], add: Any) -> Iterator[Any]:
    """The same batches; `add` is called with the seconds that each was waited for, the end included."""
    while True:
        began = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            add(time.perf_counter() - began)
        yield batch


def check_peak(text: str | None) -> None:
    """`UserError` for a `--peak_tflops` that is neither a number above 0 nor `measure`."""
    if text in (None, MEASURE):
        return
    try:
        value = float(text)  # type: ignore[arg-type]
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--peak_tflops: expected TFLOP/s of one device, above 0, or {MEASURE}, got {text}")


def peak_of(text: str | None, device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that one device could do: as `--peak_tflops` says, else from `PEAKS`; None where nobody knows."""
    if text == MEASURE:
        return measured_peak(device, dtype)
    if text is not None:
        return float(text) * 1e12
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def known_peak(name: str) -> float | None:
    """The bfloat16 peak of the device `name`, in FLOP/s; the longest part of the name that is known counts."""
    words = f" {name.replace('-', ' ')} ".lower()
    found = [known for known in PEAKS if f" {known.lower()} " in words]
    return PEAKS[max(found, key=len)] * 1e12 if found else None


def measured_peak(device: torch.device, dtype: torch.dtype, side: int = 2048, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product, the best of several runs in about `seconds`."""
    a = torch.ones(side, side, device=device, dtype=dtype)
    out, best, end = torch.empty_like(a), float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        _wait(device)
        best = min(best, max(time.perf_counter() - began, 1e-9))
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flop_rates(flops: dict[str, float], seconds: float, peak: float | None, ranks: int) -> dict[str, float]:
    """What is logged of FLOPs that all ranks together needed in `seconds`; `peak` is one device's."""
    rates = {"flops_per_second": flops["model"] / seconds}
    if peak:
        rates["mfu"] = flops["model"] / seconds / (peak * ranks)
        rates["hfu"] = flops["hardware"] / seconds / (peak * ranks)
    if flops["dense"]:
        rates["dense_flops_share"] = flops["model"] / flops["dense"]
    return rates


def wait_rates(waits: list[float], seconds: float, steps: int) -> dict[str, float]:
    """What is logged of the seconds that each rank waited for data in `seconds` and `steps`: the rank that waited
    longest, since the others then wait for it; with several ranks their mean too."""
    shares = [min(wait / seconds, 1.0) for wait in waits]
    rates = {
        "step_ms": 1000 * seconds / max(steps, 1),
        "data_wait_ms": 1000 * max(waits) / max(steps, 1),
        "data_wait_share": max(shares),
    }
    if len(shares) > 1:
        rates["data_wait_share_mean"] = sum(shares) / len(shares)
    return rates


def waited(rows: list[dict[str, Any]]) -> dict[str, float]:
    """`data_wait_share` and `data_wait_ms` over all logged steps of a run; empty without any."""
    before, steps, wait, total = 0, 0, 0.0, 0.0
    for row in rows:
        count, before = row["step"] - before, row["step"]
        if "data_wait_ms" not in row:
            continue
        steps += count
        wait += count * row["data_wait_ms"]
        total += count * row["step_ms"]
    return {"data_wait_share": wait / total, "data_wait_ms": wait / steps} if steps and total else {}


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What train_summary.json says of speed, from the training rows of metrics.jsonl: waiting, and means over steps of
    the logged FLOP figures."""
    means: dict[str, float] = {}
    for name in ("flops_per_second", "mfu", "hfu", "dense_flops_share"):
        before, weighed, total = 0, 0.0, 0.0
        for row in rows:
            count, before = row["step"] - before, row["step"]
            if name in row:
                weight = count * row.get("step_ms", 1.0)
                weighed, total = weighed + weight * row[name], total + weight
        if total:
            means[name] = weighed / total
    return waited(rows) | means


def hint(share: float, args: Any, cores: int | None = None) -> str:
    """One line on what to raise where training waits for data for more than `WAITS` of its time; else nothing.

    args: the training arguments; cores: CPU cores of this machine for each of its processes.
    """
    if share <= WAITS:
        return ""
    workers, ahead = args.dataloader_num_workers, args.dataloader_prefetch_factor or 2
    said = f"note: training waited for data for {share:.0%} of its time; "
    if workers == 0:
        return said + "images are read in the training process: raise --dataloader_num_workers (now 0) to 4 or more"
    if cores is not None and workers >= cores:
        return said + (
            f"{workers} workers share {cores} cores: store images smaller or on a faster disk, or give a process more "
            f"cores (--dataloader_prefetch_factor, now {ahead}, helps where only some batches are slow)"
        )
    return said + (
        f"raise --dataloader_num_workers (now {workers}), or --dataloader_prefetch_factor (now {ahead}) where only "
        "some batches are slow"
    )
