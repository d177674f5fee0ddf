"""A folder that is made whole or not at all. Called by everything that writes one: merging, converting, releasing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_sv.errors import UserError


def check_output(output: Path, needed: dict[str, str], force: bool, flag: str = "--output") -> None:
    """`UserError` for an `output` (`flag` names it) that exists without `force`, or that holds what is needed.

    needed: what must not be lost with `output`, in words -> where it is.
    """
    for what, path in needed.items():
        if Path(path).is_dir() and Path(path).resolve().is_relative_to(output.resolve()):
            raise UserError(f"{flag} {output}: is or holds {what}; choose another folder")
    if output.is_symlink() and not output.exists():
        raise UserError(f"{flag} {output}: is a link to nothing; choose another, or make the folder it points to")
    if output.exists() and not (output.is_dir() and (force or not any(output.iterdir()))):
        mend = "choose another, or pass --force to replace it" if output.is_dir() else "choose a folder"
        raise UserError(f"{flag} {output}: exists; {mend}")


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
