"""Attention kernels by name, and how one is forced: `gpu_parity` compares them.

A name and models arrive; inside `using` their attention runs on that kernel, and a call that it cannot serve raises
`Unavailable`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

UNAVAILABLE = "unavailable"
FLASH_ATTN = "flash-attn"

SDPA: dict[str, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
KERNELS = ("auto", *SDPA, FLASH_ATTN)
"""`auto`: what torch's sdpa chooses, which is what users run; then its kernels one by one; the package of that name."""

REFUSALS = (
    "no available kernel",
    "no viable backend",
    "no execution plans",
    "no valid engine",
    "not compiled",
    "invalid backend",
    "cudnn frontend error",
    "cudnn_status_not_supported",
)
"""What torch says, in lower case, where a kernel cannot serve a call."""

Attention = Callable[[], contextlib.AbstractContextManager[Any]]
"""A context in which attention runs on the kernel asked for."""


class Unavailable(Exception):
    """This kernel cannot serve this call here, and why."""


@contextlib.contextmanager
def only(backend: SDPBackend | None) -> Iterator[None]:
    """sdpa on this backend alone; None: on what torch chooses. Raises `Unavailable` where that cannot serve."""
    try:
        with contextlib.nullcontext() if backend is None else sdpa_kernel([backend]):
            yield
    except RuntimeError as error:
        if backend is not None and any(words in str(error).lower() for words in REFUSALS):
            raise Unavailable("this kernel does not serve the call on this device, in this precision") from error
        raise


def plain() -> contextlib.AbstractContextManager[Any]:
    """The kernel that writes attention out in plain products."""
    return sdpa_kernel([SDPBackend.MATH])


def switch(models: list[Any], implementation: str) -> None:
    """Let transformers use it in these models. Raises `Unavailable` where it cannot, with its reason."""
    try:
        for model in models:
            model.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        raise Unavailable(str(error).splitlines()[0][:300]) from error


@contextlib.contextmanager
def using(name: str, device: torch.device, dtype: torch.dtype, models: list[Any]) -> Iterator[Attention]:
    """Give the context of a kernel; for the package flash-attn, the models are switched to it meanwhile."""
    if name != FLASH_ATTN:
        yield lambda: only(SDPA.get(name))
        return
    if importlib.util.find_spec("flash_attn") is None:
        raise Unavailable("the package flash-attn is not installed")
    if device.type != "cuda" or dtype == torch.float32:
        raise Unavailable("flash-attn runs on CUDA in half precision only")
    before = [model.config._attn_implementation for model in models]
    try:
        switch(models, "flash_attention_2")
        yield contextlib.nullcontext
    finally:
        for model, implementation in zip(models, before):
            model.set_attn_implementation(implementation)
