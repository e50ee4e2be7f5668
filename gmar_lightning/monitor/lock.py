"""One record, one run: a folder is locked while a run writes to it, and another run gets a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where only runs of one process are told apart
    fcntl = None

# Locks of files belong to a process, so two runs in one process need this to see each other.
_held: set[tuple[int, Path]] = set()


class FolderLock:
    """A folder that this process writes a record to, until `release`.

    The lock is one of the operating system's on a file in the folder: it ends with the process, however that ends,
    and it is not handed on to the loader's worker processes, which may live a little longer.

    Attributes:
        folder: The folder that was asked for, or the next free one beside it: `gmar_2`, `gmar_3`, ...
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] | None = None
        named = (
            folder if folder.name.strip(".") else folder.resolve()
        )  # "." and ".." have no name to count on
        self.folder, number = folder, 1
        while not self._take():
            number += 1
            self.folder = named.with_name(f"{named.name}_{number}")

    def _take(self) -> bool:
        key = os.getpid(), self.folder.resolve()
        if key in _held:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / ".lock").open("ab")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:  # a file system without locks
            pass
        self._file, self._key = file, key
        _held.add(key)
        return True

    def release(self) -> None:
        """Let other runs use the folder."""
        if self._file is not None:
            _held.discard(self._key)
            self._file.close()
            self._file = None
