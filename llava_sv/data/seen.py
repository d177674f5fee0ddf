"""Which of many texts came before: 64-bit hashes in sorted arrays, eight bytes each, so that millions fit. Called by
`data.check` for ids, images and whole records. Two texts of nine million share a hash with a chance of 2 in a million.
"""

from __future__ import annotations

import hashlib

import numpy as np

MERGE_AT = 1 << 17
"""New hashes are kept in a set, and merged into the sorted array when there are so many."""


class Seen:
    """A set of texts that only grows."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, text: str) -> bool:
        """Put `text` in; whether it was there already."""
        value = _hash(text)
        if self._has(value):
            return True
        self._recent.add(value)
        if len(self._recent) >= MERGE_AT:
            new = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, new]), kind="stable")
            self._recent.clear()
        return False

    def __contains__(self, text: str) -> bool:
        return self._has(_hash(text))

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def _has(self, value: int) -> bool:
        if value in self._recent:
            return True
        at = int(np.searchsorted(self._sorted, np.uint64(value)))
        return at < len(self._sorted) and int(self._sorted[at]) == value


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
