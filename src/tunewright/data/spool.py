"""Bytes in a file of our own, found again by their number: for what there is too much of to stand in memory.

Knows nothing of what the bytes mean. The file has no name (it is unlinked while it is made), so only this process can
read it, and nothing of it is left however the process ends. Eight bytes of memory a piece.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from pathlib import Path

BLOCK = 1 << 20  # bytes written at once


class Spool:
    """Pieces of bytes in the order in which they came. Raises OSError where the disk does not take them."""

    def __init__(self) -> None:
        self._file = _nameless_file()
        weakref.finalize(self, os.close, self._file)
        self._ends = array("q", [0])
        self._waiting = bytearray()  # of `_written` and after: pieces that are not in the file yet
        self._written = 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        start, end = self._ends[number], self._ends[number + 1]
        if start >= self._written:
            return bytes(self._waiting[start - self._written : end - self._written])
        # read, not mapped: pages of a mapping would count as this process's memory
        return os.pread(self._file, end - start, start)

    def append(self, piece: bytes) -> None:
        """The piece is held even where this raises."""
        self._waiting += piece
        self._ends.append(self._written + len(self._waiting))
        if len(self._waiting) < BLOCK:
            return
        done = 0
        while done < len(self._waiting):
            done += os.pwrite(self._file, self._waiting[done:], self._written + done)
        self._written, self._waiting = self._written + done, bytearray()


def _nameless_file() -> int:
    """A file that only its descriptor leads to; on a disk rather than in memory where there is a choice."""
    folder = os.environ.get("TMPDIR") or ("/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir())  # noqa: S108
    handle, name = tempfile.mkstemp(prefix="tunewright-rows-", dir=folder)  # 0600
    Path(name).unlink()
    return handle
