"""Weights between files and modules: projector files, strict key checks, parameters partitioned by ZeRO-3.

Called by the builders and by training.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from llava_sv.errors import UserError
from llava_sv.model.partitioned_loading import loading_by_chunks

PROJECTOR_KEY = "mm_projector."
COME_AND_GO = ("summary.", "image_newline")
"""Projector weights that a file may lack (they start fresh) or leave over: skipping and dense `anyres` have them."""
UNREADABLE = (OSError, SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)
"""What torch.load and safetensors raise for a file that is torn, or is something else."""


def out_of_reach() -> bool:
    """Whether the hub's name leads nowhere on this machine: asking it would be half a minute of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if any(getproxies().values()):
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters inside, also under ZeRO-3 (rank 0's changes are broadcast); a no-op without it."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


def load_strictly(
    model_class: Any, path: str, new_weights: tuple[str, ...] = (), unused_weights: tuple[str, ...] = (), **options: Any
) -> Any:
    """`model_class.from_pretrained(path, **options)`, with a `UserError` that names keys which do not fit.

    new_weights: key prefixes that may be missing, because they start fresh; unused_weights: prefixes that may be extra.
    """
    try:
        with (
            _quiet("transformers.modeling_utils"),
            _quiet("transformers.distributed.tensor_parallel"),
            loading_by_chunks(model_class),
        ):
            model, info = model_class.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (OSError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path}: weights cannot be read ({str(error).splitlines()[0]})") from error
    refuse_key_mismatch(path, info, new_weights, unused_weights)
    return model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Errors only from this logger: its tables alarm over expected keys, and our own line says what is wrong."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def refuse_key_mismatch(
    where: str, info: dict[str, Any], new_weights: tuple[str, ...] = (), unused_weights: tuple[str, ...] = ()
) -> None:
    """`UserError` that names missing, unexpected or misshapen keys of `from_pretrained`'s loading info."""
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(new_weights or ("\0",)))
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(unused_weights or ("\0",)))
    misshapen = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    for keys, what, mend in (
        (
            missing,
            "lacks",
            "they would start untrained; is this the right checkpoint for its config.json?",
        ),
        (unexpected, "has, unlike its config,", "does config.json belong to these weights?"),
        (misshapen, "has in another shape than its config says", "does config.json belong to these weights?"),
    ):
        if keys:
            raise UserError(f"checkpoint {where}: {what} {len(keys)} key(s): {_some(keys)}; {mend}")


def load_projector(model: Any, path: str) -> None:
    """Load a pretrained projector (`mm_projector.bin` or `.safetensors`, or a folder with one) into `model`.

    Keys may carry any prefix before `mm_projector.`. Weights of `COME_AND_GO` may be absent or left over, but nothing
    else. A resampler takes the weights of a preset with fewer tokens too (compound scaling). Raises `UserError` with
    the names of keys that do not fit.
    """
    weights = {
        k.split(PROJECTOR_KEY, 1)[1]: v for k, v in read_weights(projector_file(path)).items() if PROJECTOR_KEY in k
    }
    projector = model.get_model().mm_projector
    weights = projector.adapted(weights, path)
    wanted = dict(projector.named_parameters())
    missing = sorted(key for key in wanted if key not in weights and not key.startswith(COME_AND_GO))
    unexpected = sorted(key for key in weights if key not in wanted and not key.startswith(COME_AND_GO))
    if missing or unexpected:
        raise UserError(
            f"projector {path}: missing keys: {_some(missing)}; unexpected keys: {_some(unexpected)}; "
            f"was it trained with mm_projector_type {model.config.mm_projector_type!r}?"
        )
    used = {key: weights[key] for key in wanted if key in weights}
    parameters = [wanted[key] for key in used]
    with torch.no_grad(), gathered(parameters):
        for key, value in used.items():
            if wanted[key].shape != value.shape and wanted[key].numel():
                raise UserError(
                    f"projector {path}: {key} has shape {list(value.shape)}, the model wants {list(wanted[key].shape)}"
                )
            if wanted[key].numel():
                wanted[key].copy_(value)


def projector_file(path: str) -> str:
    """The weights file at `path`, which may be the folder that pretraining wrote."""
    names = ("mm_projector.safetensors", "mm_projector.bin")
    found = (
        [path]
        if os.path.isfile(path)
        else [os.path.join(path, n) for n in names if os.path.isfile(os.path.join(path, n))]
    )
    if not found:
        raise UserError(
            f"projector {path}: no such file, and no folder with {' or '.join(names)}; pretraining writes it"
        )
    return found[0]


def read_weights(path: str) -> dict[str, Tensor]:
    """A safetensors or torch file as a dict of tensors; `UserError` where it cannot be read."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"weights {path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(weights, dict):
        raise UserError(f"weights {path}: hold a {type(weights).__name__}, not a dict of tensors")
    return weights


def _some(keys: list[str], limit: int = 5) -> str:
    if not keys:
        return "none"
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
