"""Loading under ZeRO-3: no process ever holds a whole checkpoint, and keys are checked as strictly as elsewhere.

transformers' own loading there has one process map the whole checkpoint at once (or every process read it, where it is
a .bin file), and does not look for keys that are left over or misshapen. Here every process reads names and shapes, and
the values of a bounded number of bytes at a time are read by one process and given to the others.
Called by `checkpoint_io.load_strictly`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Parameters of at most so many bytes, as the model holds them, are whole at a time; a larger one is alone."""


@contextmanager
def loading_by_chunks(model_class: Any) -> Iterator[None]:
    """Inside, `model_class.from_pretrained` loads by chunks where ZeRO-3 is on; a no-op elsewhere.

    Everything else of `from_pretrained` (files, precision, fresh weights, tied weights) stays the library's; so does
    the loading of quantised weights, and of checkpoints whose tensors must be fused or split, not only renamed.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    library = model_class._load_pretrained_model

    def load(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> tuple[Any, Any]:
        ours = state_dict is None and checkpoint_files and load_config.hf_quantizer is None and not rest
        if not ours or not names_only(load_config.weight_mapping):
            return library(model, state_dict, checkpoint_files, load_config, *rest)
        found = load_partitioned(model, checkpoint_files, load_config.weight_mapping)
        return _as_library_info(found), None

    own = "_load_pretrained_model" in vars(model_class)
    model_class._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        if own:
            model_class._load_pretrained_model = staticmethod(library)
        else:
            del model_class._load_pretrained_model


def load_partitioned(model: Any, files: list[str], mapping: list[Any] | None = None) -> dict[str, set]:
    """Put the tensors of `files` into a model made under `deepspeed.zero.Init`. Every process calls this.

    mapping: transformers' renamings of old keys. Returns `missing_keys`, `unexpected_keys` and `mismatched_keys`
    (key, its shape in the file, its shape in the model), the same in every process.
    """
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    sources = [_Source(file) for file in files]
    name_of = _renaming(model, mapping, wanted)
    found: dict[str, set] = {"missing_keys": set(wanted), "unexpected_keys": set(), "mismatched_keys": set()}
    for source in sources:
        fitting = {}
        for key, shape in source.shapes.items():
            name = name_of(key)
            if name not in wanted:
                found["unexpected_keys"].add(name)
                continue
            found["missing_keys"].discard(name)
            here = tuple(getattr(wanted[name], "ds_shape", wanted[name].shape))
            if here != shape:
                found["mismatched_keys"].add((name, shape, here))
            else:
                fitting[key] = wanted[name]
        for keys in chunks({key: _bytes_of(value) for key, value in fitting.items()}):
            _fill(source, {key: fitting[key] for key in keys})
    return found


def chunks(sizes: dict[str, int], limit: int | None = None) -> Iterator[list[str]]:
    """Keys in order, grouped so that their sizes come to at most `limit` (default: `CHUNK_BYTES`), but one at least."""
    limit = CHUNK_BYTES if limit is None else limit
    group: list[str] = []
    total = 0
    for key, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    if group:
        yield group


def _fill(source: _Source, targets: dict[str, Tensor]) -> None:
    """Copy these keys of `source` into their parameters: the first process reads, the others are given the values."""
    import deepspeed
    import torch.distributed as dist

    partitioned = [value for value in targets.values() if hasattr(value, "ds_id")]
    plain = {key: value for key, value in targets.items() if not hasattr(value, "ds_id")}
    with torch.no_grad(), deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        if dist.get_rank() == 0:
            source.copy_into(targets)
    for value in targets.values():
        value._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers: not to be drawn anew
    for value in plain.values():
        dist.broadcast(value.data, src=0)


class _Source:
    """One file of a checkpoint: shapes of its tensors without their values, and values on demand."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]]
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        else:
            values = torch.load(path, map_location="meta", weights_only=True)
            self.shapes = {key: tuple(value.shape) for key, value in values.items()}

    def copy_into(self, targets: dict[str, Tensor]) -> None:
        """Each key's values into its target. The file is open for this call only: what was mapped of it goes again."""
        if self.path.endswith(".safetensors"):
            with safe_open(self.path, framework="pt") as file:
                for key, value in targets.items():
                    value.data.copy_(file.get_tensor(key))
            return
        # the older format without a zip archive cannot be mapped: it is read whole
        values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
        for key, value in targets.items():
            value.data.copy_(values[key])


def names_only(mapping: list[Any] | None) -> bool:
    """Whether transformers' table for a checkpoint renames keys, and does nothing to their tensors."""
    from transformers.core_model_loading import WeightRenaming

    return all(isinstance(entry, WeightRenaming) for entry in mapping or [])


def _renaming(model: Any, mapping: list[Any] | None, wanted: dict[str, Tensor]) -> Any:
    """A function from a file's key to the model's, by transformers' own table of old names (`names_only`)."""
    from transformers.core_model_loading import rename_source_key

    options = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": wanted}

    def name_of(key: str) -> str:
        return rename_source_key(key, mapping or [], [], **options)[0]

    return name_of


def _persistent_buffers(model: Any) -> dict[str, Tensor]:
    kept = set(model.state_dict(keep_vars=True))
    return {name: value for name, value in model.named_buffers() if name in kept}


def _bytes_of(value: Tensor) -> int:
    return int(getattr(value, "ds_numel", value.numel())) * value.element_size()


def _as_library_info(found: dict[str, set]) -> Any:
    """transformers' own record of what was loaded; fields that it has and that nothing here fills stay empty."""
    from transformers.modeling_utils import LoadStateDictInfo

    values: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}, **found}
    filled = {field.name: values.get(field.name, set()) for field in fields(LoadStateDictInfo) if field.init}
    return LoadStateDictInfo(**filled)
