"""A folder of adapters and its base to one whole checkpoint in the usual layout.

Called by `release.convert`. Weights are added on the CPU in the wider precision of adapter and base, and kept in the
base's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_sv.errors import UserError
from llava_sv.model.adapters import CONFIG, base_of, is_adapter
from llava_sv.model.builder import load_pretrained_model


def merge_lora(adapter: str, base: str | None, output: str, force: bool = False) -> None:
    """Write `output`: weights, config, tokenizer, image processor, as full fine-tuning leaves them.

    base: the model that the adapters were trained on; default: the one that they remember. Raises `UserError` for what
    does not fit together, and for an `output` that exists without `force`.
    """
    if not is_adapter(adapter):
        raise UserError(f"--merge-lora {adapter}: no {CONFIG} there; give the folder that a LoRA run wrote")
    base = base_of(adapter, base)
    _check_output(Path(output), {"the adapter": adapter, "the base": base, "the current folder": "."}, force)
    tokenizer, model, image_processor, _ = load_pretrained_model(adapter, base, device="cpu", device_map=None)
    model.config.use_cache = True
    with replacing_folder(Path(output)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
    print(f"{output}: {adapter} merged into its base; load it as any checkpoint")


def _check_output(output: Path, needed: dict[str, str], force: bool) -> None:
    """needed: what must not be lost with `output`, in words -> where it is."""
    for what, path in needed.items():
        if Path(path).is_dir() and Path(path).resolve().is_relative_to(output.resolve()):
            raise UserError(f"--output {output}: is or holds {what}; choose another folder")
    if output.exists() and not (output.is_dir() and (force or not any(output.iterdir()))):
        mend = "choose another, or pass --force to replace it" if output.is_dir() else "choose a folder"
        raise UserError(f"--output {output}: exists; {mend}")


@contextmanager
def replacing_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `output`; on leaving without an error it takes `output`'s place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if output.exists():
            output.rename(old)
        new.rename(output)
    finally:
        if not output.exists() and (work / "old").exists():  # stopped between the two renamings
            (work / "old").rename(output)
        shutil.rmtree(work, ignore_errors=True)
