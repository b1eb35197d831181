"""Tensors by key on the disk, shared between runs: whole or absent, checked when read, mapped and not loaded.

A space is all that makes two tensors of one key the same (weights, place, precision, versions); its name is the hash of
that. Knows keys, tensors and segments of two files; not what they are of. Nothing here can stop a run: what cannot be
read is computed again, what cannot be written stays in memory, and `said` tells so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunewright.engine import cache_folder
from tunewright.engine.cache_folder import Segment

FORMAT = 1
DIMENSIONS = 4
RECORD = np.dtype([("key", "V32"), ("start", "<u8"), ("stop", "<u8"), ("shape", "<u4", DIMENSIONS), ("sum", "V16")])
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class Damaged(Exception):
    """A segment that is not what was written."""


class FeatureStore:
    """The store under one folder; `said` collects sentences for the run's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []

    @classmethod
    def open(cls) -> tuple[FeatureStore | None, str]:
        """(the store, "") or (None, why there is none)."""
        folder, why = cache_folder.folder()
        return (cls(folder), "") if folder else (None, why)

    # ------------------------------------------------------------------ reading
    def read(self, space: str, keys: Set[bytes]) -> dict[bytes, Tensor]:
        """Those of the tensors that are there. Mapped: they take memory only while they are used, and are not written.

        A segment with a wrong checksum goes as a whole.
        """
        found: dict[bytes, Tensor] = {}
        for index in sorted((self.folder / space).glob("*.index")):
            if not keys - found.keys():
                break
            try:
                part = _tensors(index, keys - found.keys())
            except FileNotFoundError:
                continue  # another process has just made room
            except (OSError, Damaged, ValueError, KeyError, TypeError) as error:
                why = getattr(error, "strerror", None) or error  # no path: runs are shown to others
                self.said.append(f"A damaged part of the shared cache was thrown away ({why}); it is computed anew.")
                with contextlib.suppress(OSError):
                    Segment(index, 0, 0.0).remove()
                continue
            if part:
                with contextlib.suppress(OSError):
                    os.utime(index)  # what is used stays longest
            found |= part
        return found

    # ------------------------------------------------------------------ writing
    def write(self, space: str, tensors: Mapping[bytes, Tensor], about: Mapping[str, Any]) -> dict[bytes, Tensor]:
        """Keep these, all of one dtype, and give them back mapped; or as they came, where the disk does not take them.

        about: for people, in `tunewright cache`.
        """
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        place = self.folder / space
        try:
            if why := cache_folder.make_room(self.folder, size):
                return self._not_written(why, tensors)
            place.mkdir(mode=0o700, exist_ok=True)
            if not (place / "about.json").exists():
                _write_whole(place / "about.json", json.dumps(dict(about)).encode())
            index = _write_segment(place, tensors)
            return _tensors(index, tensors.keys(), checked=False)
        except (OSError, Damaged) as error:
            return self._not_written(getattr(error, "strerror", None) or str(error), tensors)

    def _not_written(self, why: str, tensors: Mapping[bytes, Tensor]) -> dict[bytes, Tensor]:
        sentence = f"Kept in memory and not shared with other runs: {why}."
        if sentence not in self.said:
            self.said.append(sentence)
        return dict(tensors)


# ------------------------------------------------------------------------ segments
def _write_segment(place: Path, tensors: Mapping[bytes, Tensor]) -> Path:
    name = f"{time.time_ns():016x}-{os.getpid()}-{secrets.token_hex(4)}"
    rows, index = place / f"{name}.rows", place / f"{name}.index"
    records = np.zeros(len(tensors), RECORD)
    dtype, end = next(iter(tensors.values())).dtype, 0
    try:
        with _private(rows) as file:
            for record, (key, tensor) in zip(records, tensors.items(), strict=True):
                data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                shape = [*tensor.shape, *[0] * (DIMENSIONS - tensor.ndim)]
                record["key"], record["start"], record["stop"] = key, end, end + len(data)
                record["shape"], record["sum"] = shape, _sum(data)
                end += len(data)
                file.write(data)
        held = records.tobytes()
        header = {
            "format": FORMAT, "dtype": str(dtype).removeprefix("torch."), "ndim": next(iter(tensors.values())).ndim,
            "count": len(tensors), "bytes": end, "sha256": hashlib.sha256(held).hexdigest(),
        }  # fmt: skip
        _write_whole(index, json.dumps(header).encode() + b"\n" + held)
    except BaseException:
        rows.unlink(missing_ok=True)  # half a segment only takes room
        raise
    return index


def _tensors(index: Path, keys: Set[bytes], checked: bool = True) -> dict[bytes, Tensor]:
    """The tensors of one segment that are asked for. Raises Damaged or OSError."""
    first, _, held = index.read_bytes().partition(b"\n")
    header = json.loads(first)
    if header["format"] != FORMAT or hashlib.sha256(held).hexdigest() != header["sha256"]:
        raise Damaged("its index is not as it was written")
    records = np.frombuffer(held, RECORD)
    wanted = [record for record in records if bytes(record["key"]) in keys]
    if not wanted:
        return {}
    rows = index.with_suffix(".rows")
    if rows.stat().st_size != header["bytes"]:
        raise Damaged("its rows are cut short")
    # copy on write: torch wants memory that may be written, and the file must not be
    data = np.memmap(rows, np.uint8, "c")
    found = {}
    for record in wanted:
        part = data[int(record["start"]) : int(record["stop"])]
        if checked and _sum(part) != bytes(record["sum"]):
            raise Damaged("a checksum does not agree")
        shape = [int(n) for n in record["shape"][: header["ndim"]]]
        found[bytes(record["key"])] = torch.from_numpy(part).view(DTYPES[header["dtype"]]).view(shape)
    return found


def _sum(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _private(path: Path) -> Any:
    """A new file that only its owner may read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    beside = path.with_name(f"{path.name}-{secrets.token_hex(4)}.partial")
    try:
        with _private(beside) as file:
            file.write(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
