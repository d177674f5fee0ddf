"""Pickled files of a run that is resumed: looked through before DeepSpeed, which reads them unrestricted, may.

A checkpoint under DeepSpeed holds counters and moments that only DeepSpeed reads, with Python's full unpickler: what is
called in such a file is run. Each is read here first by torch's restricted unpickler, without its values: it knows
tensors, plain values and the few classes that DeepSpeed writes, and stops at anything else. Called by `train` and
`universal`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llava_sv.errors import UserError
from llava_sv.model.checkpoint_io import UNREADABLE

TRUST = "LLAVA_SV_TRUST_CHECKPOINT"
"""Environment variable: 1 skips the check, for a checkpoint of one's own that another DeepSpeed wrote."""

WRITTEN_BY_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of its own that DeepSpeed's checkpoints name; none does anything when it is made."""


def check_pickles(folder: Path) -> None:
    """`UserError` for a pickled file in `folder`, or below it, that names anything but values and known classes.

    No values are read: it takes a moment, whatever the size of the model.
    """
    if os.environ.get(TRUST) == "1":
        return
    for path in sorted(path for path in folder.rglob("*.pt") if path.is_file()):
        read_restricted(path, "meta")


def read_restricted(path: Path, device: str = "cpu") -> Any:
    """What a file of DeepSpeed's holds, its tensors on `device`. `UserError` for one that would run something."""
    try:
        with _deepspeed_known():
            return torch.load(path, map_location=device, weights_only=os.environ.get(TRUST) != "1")
    except UNREADABLE as error:
        why = " ".join(str(error).split())
        at = why.find("Unsupported global: GLOBAL ")
        if at < 0:
            raise UserError(f"{path}: cannot be read ({why[:200]})") from error
        name = why[at:].split()[3]
        raise UserError(
            f"{path}: names {name}, which no checkpoint needs and which reading would run; take a checkpoint of your "
            f"own run, and if this is one, set {TRUST}=1"
        ) from error


@contextmanager
def _deepspeed_known() -> Iterator[None]:
    known = []
    for name in WRITTEN_BY_DEEPSPEED:
        module, _, attribute = name.rpartition(".")
        try:
            known.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError):  # another version, or none: then no file can name it
            continue
    with torch.serialization.safe_globals(known):
        yield
