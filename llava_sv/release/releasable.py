"""What kind of folder is to be released, and the whole checkpoint that it stands for.

A folder as training wrote it comes in; a `Source` goes out, or the reason why it cannot be released and what to run.
Called by `release`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.adapters import base_of, is_adapter
from llava_sv.model.llava_layout import WEIGHTS
from llava_sv.train.checkpoint import MARKER, PROJECTOR, last_complete_checkpoint, what_is_torn


@dataclass(frozen=True)
class Source:
    """A checkpoint to release."""

    given: Path
    """The folder that was named: the run's own files are there, or beside it."""
    whole: Path
    """The folder with whole weights: `given`, or what merging its adapters made."""
    base: str | None = None
    """The model that the adapters were merged into."""


def check_source(given: Path, base: str | None) -> str | None:
    """The base of a LoRA folder, None for a whole checkpoint; `UserError` for a folder that cannot be released."""
    if given.is_file():
        raise UserError(f"checkpoint {given}: is a file; give the folder that it is in")
    if not given.is_dir():
        raise UserError(f"no such checkpoint folder: {given}; give one that training wrote")
    torn = what_is_torn(given) if (given / MARKER).is_file() else None
    if torn is not None:
        raise UserError(f"checkpoint {given}: is not complete: {torn}; release another")
    if is_adapter(str(given)):
        return base_of(str(given), base)
    if base is not None:
        raise UserError(f"--base {base}: is for LoRA adapters, and {given} holds none; drop it")
    if not any((given / name).is_file() for name in WEIGHTS):
        raise UserError(f"checkpoint {given}: {_why_no_weights(given)}")
    return None


def _why_no_weights(given: Path) -> str:
    """What a folder without whole weights is, and what to do."""
    if any((given / f"{PROJECTOR}.{kind}").is_file() for kind in ("safetensors", "bin")):
        return (
            "holds a projector alone, and a release is a whole model; release what was fine-tuned from it "
            "(or share its mm_projector.safetensors and config.json as they are)"
        )
    partitions = sorted(path.name for path in given.glob("global_step*") if path.is_dir())
    if partitions:
        where = shlex.quote(str(given))
        mend = f"run python {shlex.quote(str(given / 'zero_to_fp32.py'))} {where} {where} --safe_serialization first"
        return f"holds DeepSpeed's partitions ({partitions[-1]}) and no whole weights; {mend}"
    last = last_complete_checkpoint(given)
    if last is not None:
        return f"has no weights of its own, the run has not finished; release {last}, or wait"
    return f"has no weights ({' or '.join(WEIGHTS)}); give the folder that training wrote"


@contextmanager
def whole_checkpoint(given: Path, base: str | None, beside: Path) -> Iterator[Source]:
    """Yield the `Source` of a folder that `check_source` took; adapters are merged into a temporary folder in `beside`,
    which must have room for a whole model."""
    if base is None:
        yield Source(given, given)
        return
    from llava_sv.release.merge_lora import merge_lora

    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".merged.", dir=beside) as folder:
        whole = Path(folder) / given.absolute().name
        merge_lora(str(given), base, str(whole), force=True)
        yield Source(given, whole, base)


def default_name(given: Path) -> str:
    """A checkpoint's name: its folder's, with the run's before it for a `checkpoint-N`."""
    path = Path(given.absolute())
    return f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name


def encoder_is_inside(values: dict[str, Any]) -> bool:
    """Whether the checkpoint holds its encoder instead of naming it."""
    return values.get("vision_config") is not None
