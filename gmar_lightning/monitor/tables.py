"""Tables of all probes in arrays that grow as a list does: a probe more costs the same, however many there are."""

from __future__ import annotations

import numpy as np


class GrowingArray:
    """An array `(entries, *shape)` that entries are added to at the end.

    The room doubles when it is full, so that adding n entries copies fewer than 2 n.

    Args:
        shape: Of one entry.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._room = np.empty((16, *shape), dtype=np.float32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, entry: np.ndarray) -> None:
        """Add one entry of the array's shape."""
        if self._count == len(self._room):
            self._room = np.concatenate([self._room, np.empty_like(self._room)])
        self._room[self._count] = entry
        self._count += 1

    @property
    def all(self) -> np.ndarray:
        """Every entry so far, `(entries, *shape)`; a read-only view."""
        view = self._room[: self._count]
        view.flags.writeable = False
        return view
