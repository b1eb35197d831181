"""The folder that keeps what runs share: where it is, who may read it, how much room it takes, what leaves it first.

Everything in it can be computed again. It is derived from a person's rows, so only that person may read it. Knows files
and sizes; not what stands in them, and no torch.

A space is a folder of segments. A segment is two files: NAME.rows, and NAME.index, which is written last: rows without
an index are no segment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 10 << 30  # bytes; what was used longest ago leaves first
MARGIN = 2 << 30  # bytes of the disk that stay free
ABANDONED = 3600.0  # seconds after which what a killed run left half written is taken away
OFF = ("off", "0", "no", "false")


@dataclass(frozen=True)
class Segment:
    """Rows that were written together."""

    index: Path
    size: int  # bytes, of both files
    used: float  # when it was last read or written

    @property
    def rows(self) -> Path:
        return self.index.with_suffix(".rows")

    def remove(self) -> None:
        """The index first: whoever reads meanwhile finds all of it or nothing. What is open stays readable."""
        self.index.unlink(missing_ok=True)
        self.rows.unlink(missing_ok=True)


def folder(environ: Mapping[str, str] = os.environ) -> tuple[Path | None, str]:
    """(the folder, made if need be; "") or (None, why there is none)."""
    if why := is_off(environ):
        return None, why
    path = place(environ)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.geteuid():
            return None, "its folder belongs to somebody else"
        if stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o700)
        if not os.access(path, os.W_OK):
            return None, "its folder cannot be written"
    except OSError as error:
        return None, f"its folder cannot be made ({error.strerror})"  # no path: runs are shown to others
    return path, ""


def is_off(environ: Mapping[str, str] = os.environ) -> str:
    """Why nothing is shared, or ""."""
    return "TUNEWRIGHT_CACHE switches it off" if environ.get("TUNEWRIGHT_CACHE", "").lower() in OFF else ""


def place(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the folder is, or would be."""
    own, base = environ.get("TUNEWRIGHT_CACHE_DIR"), environ.get("XDG_CACHE_HOME")
    home = Path(own).expanduser() if own else Path(base or "~/.cache").expanduser() / "tunewright"
    return home / "activations"


def segments(path: Path) -> list[Segment]:
    """All of them, the one used longest ago first. What another process takes away meanwhile is left out."""
    found = []
    for index in path.glob("*/*.index"):
        with contextlib.suppress(OSError):
            own, rows = index.stat(), index.with_suffix(".rows").stat()
            found.append(Segment(index, own.st_size + rows.st_size, own.st_mtime))
    return sorted(found, key=lambda segment: (segment.used, segment.index.name))


def make_room(path: Path, needed: int) -> str:
    """Let the oldest go until `needed` bytes fit under the limit; a reason why they may not be written all the same."""
    if needed > LIMIT:
        return f"its limit is {LIMIT >> 30} GB"
    _sweep(path)
    there = segments(path)
    total = sum(segment.size for segment in there)
    for segment in there:
        if total + needed <= LIMIT:
            break
        segment.remove()
        total -= segment.size
    if shutil.disk_usage(path).free - needed < MARGIN:
        return f"less than {MARGIN >> 30} GB of the disk would stay free"
    return ""


def _sweep(path: Path) -> None:
    """What a killed run left half written, and rows whose index is gone."""
    old = time.time() - ABANDONED
    for file in [*path.glob("*/*.partial"), *path.glob("*/*.rows")]:
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < old and not file.with_suffix(".index").exists():
                file.unlink()


def entries(path: Path) -> list[dict[str, Any]]:
    """One line for each space: what it is of, how large, and when it was last used."""
    found: dict[Path, dict[str, Any]] = {}
    for segment in segments(path):
        space = segment.index.parent
        entry = found.setdefault(space, {"name": space.name[:12], **_about(space), "bytes": 0, "used": 0.0})
        entry["bytes"] += segment.size
        entry["used"] = max(entry["used"], segment.used)
    return sorted(found.values(), key=lambda entry: -entry["used"])


def _about(space: Path) -> dict[str, Any]:
    try:
        about = json.loads((space / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def clear(path: Path) -> int:
    """Take everything away; the number of bytes that it held. Raises OSError where it cannot."""
    held = sum(segment.size for segment in segments(path))
    if path.is_dir():
        shutil.rmtree(path)
    return held
