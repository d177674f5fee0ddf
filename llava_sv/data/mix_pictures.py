"""Whether the pictures that records name are there: file names looked up in folders that are listed once. Nothing is
opened; what lies inside a container is taken on trust. Called by `data.mix_parts`."""

from __future__ import annotations

import os
from pathlib import Path

from llava_sv.data.image_refs import SEPARATOR

NAMES_HELD = 1 << 20
"""File names kept in memory, all folders together: about 130 MB."""


class Pictures:
    """The files below `root`. A folder is listed when first asked about, which is much cheaper than asking for each of
    its files, above all over a network; one that had to be forgotten for others is from then on asked file by file."""

    def __init__(self, root: str | os.PathLike[str], names_held: int = NAMES_HELD) -> None:
        self.root = Path(root)
        self._names_held, self._held = names_held, 0
        self._listed: dict[str, frozenset[str]] = {}
        self._forgotten: set[str] = set()
        self._states: dict[str, int] = {}

    def has(self, ref: str) -> bool:
        """Whether the file, or the container that `ref` names a member of, is there."""
        folder, _, name = ref.partition(SEPARATOR)[0].rpartition("/")
        names = self._listed.get(folder)
        if names is None:
            if folder in self._forgotten:
                return os.path.isfile(self.root / folder / name)
            names = self._list(folder)
        return name in names

    def state(self, ref: str) -> tuple[str, int]:
        """The folder of a picture that was asked about, and the folder's state before it was listed."""
        folder = ref.partition(SEPARATOR)[0].rpartition("/")[0]
        return folder, self._states.get(folder, 0)

    def _list(self, folder: str) -> frozenset[str]:
        self._states[folder] = folder_state(self.root, folder)
        try:
            with os.scandir(self.root / folder) as entries:
                names = frozenset(each.name for each in entries if not each.is_symlink() or os.path.exists(each))
        except (FileNotFoundError, NotADirectoryError):
            names = frozenset()
        self._held += len(names) + 1
        while self._listed and self._held > self._names_held:
            oldest = next(iter(self._listed))
            self._held -= len(self._listed.pop(oldest)) + 1
            self._forgotten.add(oldest)
        self._listed[folder] = names
        return names


def folder_state(root: Path, folder: str) -> int:
    """A number that changes when a file is put into the folder: the nanosecond of its last change, 0 where it is not
    there."""
    try:
        return os.stat(root / folder).st_mtime_ns
    except OSError:
        return 0
