"""A disk that fails when told to: every operation under one folder is counted, and the N-th one goes wrong.

After SQLite's test_vfs: an error that is returned, a full disk, a process that dies on the spot, and a power cut, which
loses whatever was not fsynced. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save

NEEDS_ROOM = ("open", "write", "mkdir", "rename", "fsync")


class Killed(BaseException):
    """The process is dead: nothing catches this, and nothing that runs later reaches the disk."""


class Disk:
    """how: "count" nothing fails, "eio" or "enospc" at the N-th operation, "full" from the N-th on, "kill" at the N-th;
    "power" is a kill after which `power_cut` leaves only what was synced.
    """

    def __init__(self, root: Path, how: str = "count", at: int = 0) -> None:
        self.root, self.how, self.at = str(root), how, at
        self.count, self.dead, self.kinds = 0, False, []
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._held: list[int] = []  # open handles: an inode that is in use is not given to another file

    # ------------------------------------------------------------------ failing
    def operation(self, kind: str, path: object, half: Callable[[], object] = lambda: None) -> None:
        """Counts, and fails where told to. `half`: what of the operation is done before it fails."""
        if not str(path).startswith(self.root):
            return
        if self.dead:
            raise Killed
        self.count += 1
        self.kinds.append(kind)
        if self.count < self.at or (self.count > self.at and self.how != "full"):
            return
        if self.how in ("kill", "power"):
            half()
            self.dead = True
            raise Killed
        if self.how == "eio" or (self.how in ("enospc", "full") and kind in NEEDS_ROOM):
            half()
            number = errno.EIO if self.how == "eio" else errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path))

    @contextlib.contextmanager
    def mounted(self, monkeypatch: Any) -> Iterator[Disk]:
        """All that the house writes with goes through this disk. fsync costs nothing here."""
        from tunewright.engine import checkpoint

        real = {name: getattr(os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "truncate")}
        self._everything_is_synced()
        with monkeypatch.context() as patch:

            def around(name: str, kind: str) -> Callable[..., Any]:
                def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                    whole = _whole(path, kwargs.get("dir_fd"))
                    self.operation(kind, whole)
                    self._hold(whole if kind in ("unlink", "rmdir") else args[0] if kind == "rename" else None)
                    return real[name](path, *args, **kwargs)

                return call

            for name in real:
                patch.setattr(os, name, around(name, {"replace": "rename"}.get(name, name)))
            patch.setattr(os, "fsync", self._fsync)
            patch.setattr(io, "open", self._open)
            patch.setattr(checkpoint, "save_file", self._save_file)
            yield self

    def _open(self, path: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any) -> Any:
        if mode[0] not in "wa" or not str(path).startswith(self.root):
            return open(path, mode, buffering, encoding, *rest)
        self.operation("open", path)
        writer = io.BufferedWriter(_File(self, path, mode[0]))
        return writer if "b" in mode else io.TextIOWrapper(writer, encoding=encoding)

    def _fsync(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        self.operation("fsync", path)
        self._synced(path)

    def _save_file(self, tensors: Any, path: Path) -> None:
        """safetensors writes by itself, in Rust, and puts the system's number into words."""
        try:
            with self._open(path, "wb") as file:
                file.write(save(tensors))
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None

    # ---------------------------------------------------------------- power cut
    def _everything_is_synced(self) -> None:
        for folder, _, names in os.walk(self.root):
            self._synced(folder)
            for name in names:
                self._synced(os.path.join(folder, name))

    def _synced(self, path: str) -> None:
        number = os.stat(path).st_ino
        if os.path.isdir(path):
            self._folders[number] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._files[number] = Path(path).read_bytes()

    def _hold(self, path: Any) -> None:
        if path is not None and os.path.exists(path):
            self._held.append(os.open(path, os.O_RDONLY))

    def power_cut(self, lives: Callable[[str], bool]) -> None:
        """The folder as it is after the lights went out: un-synced contents are gone.

        lives: for each folder, by its last name, whether its names reached the disk although nobody asked; otherwise it
        has the names that it had when it was synced last.
        """
        places = [self.root, *(os.path.join(f, n) for f, kinds, names in os.walk(self.root) for n in kinds + names)]
        paths = {os.stat(place).st_ino: place for place in places}
        found: list[tuple[str, bytes | None]] = []

        def visit(number: int, place: str, name: str, is_folder: bool) -> None:
            if not is_folder:
                found.append((place, self._files.get(number, b"")))
                return
            found.append((place, None))
            entries = self._folders.get(number, {})
            if lives(name):
                here = paths.get(number)
                entries = {e.name: e.inode() for e in os.scandir(here)} if here else {}
            for child, inode in entries.items():
                known = inode in self._folders or os.path.isdir(paths.get(inode, ""))
                visit(inode, os.path.join(place, child), child, known)

        visit(os.stat(self.root).st_ino, self.root, "", True)
        self.release()
        shutil.rmtree(self.root)
        for place, content in found:
            if content is None:
                os.mkdir(place)
            else:
                Path(place).write_bytes(content)

    def release(self) -> None:
        for handle in self._held:
            os.close(handle)
        self._held.clear()


class _File(io.FileIO):
    """A write that fails has written half."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        self._disk = disk
        super().__init__(str(path), mode)

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._disk.operation("write", self.name, lambda: super(_File, self).write(content[: len(content) // 2]))
        return super().write(content)


def _whole(path: Any, folder: int | None) -> str:
    """The path that a call relative to an open folder means; shutil.rmtree makes such calls."""
    return str(path) if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
