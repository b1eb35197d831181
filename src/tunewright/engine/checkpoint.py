"""Checkpoints that are whole or not there: safetensors and JSON, a manifest last, one atomic rename.

Knows files, hashes and step numbers. Does not know what is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewright.contracts import State
from tunewright.errors import Fault, RunError
from tunewright.rundir import RunDir, sync

FORMAT = 1


def save(run: RunDir, state: State, digest: str, tensors: dict[str, dict[str, Tensor]], extra: dict[str, Any]) -> Path:
    """Write `checkpoints/000200/`: one safetensors file per mapping of `tensors`, `state.json`, the manifest last."""
    target = run.path / "checkpoints" / f"{state.step:06d}"
    beside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _write(beside, state, digest, tensors, extra)
        replaced = target.with_name(f"{target.name}.tmp-replaced")
        if target.exists():
            target.rename(replaced)
        beside.rename(target)
        sync(target.parent)
    except Exception:
        shutil.rmtree(beside, ignore_errors=True)  # half a checkpoint only takes room that is wanting already
        _tidy(target.parent)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _write(
    beside: Path, state: State, digest: str, tensors: dict[str, dict[str, Tensor]], extra: dict[str, Any]
) -> None:
    beside.mkdir(parents=True)
    for name, mapping in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in mapping.items()}, beside / f"{name}.safetensors")
    (beside / "state.json").write_text(json.dumps(asdict(state) | {"extra": extra}), encoding="utf-8")
    files = {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in sorted(beside.iterdir())}
    manifest = {"format": FORMAT, "step": state.step, "recipe": digest, "files": files}
    (beside / "MANIFEST.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*beside.iterdir(), beside):
        sync(path)


def latest(run: RunDir, digest: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, by step number and never by file time, and what was skipped and why.

    Damaged ones are moved to `quarantine/`, where they can be looked at.
    """
    _tidy(run.path / "checkpoints")
    skipped: list[str] = []
    allowed = {digest, *(change["was"] for change in run.lines("changes"))}  # --allow-change wrote them down
    for path in sorted(_all(run), key=lambda p: int(p.name), reverse=True):
        problem = verify(path, allowed)
        if problem is None:
            return path, skipped
        skipped.append(f"checkpoint {path.name} skipped: {problem}")
        away = run.path / "quarantine"
        away.mkdir(exist_ok=True)
        shutil.rmtree(away / path.name, ignore_errors=True)
        path.rename(away / path.name)
    return None, skipped


def verify(path: Path, digests: Collection[str]) -> str | None:
    """None if whole and of one of these recipes; otherwise what is wrong, naming the file."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
        files = {name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
        recipe = manifest["recipe"]
        if (manifest["format"], manifest["step"]) != (FORMAT, int(path.name)):
            return f"MANIFEST.json is of format {manifest['format']} and step {manifest['step']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "MANIFEST.json is missing or cannot be read"
    if recipe not in digests:
        return f"it belongs to another recipe ({recipe})"
    for name, (size, sha256) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _digest(file) != sha256:
            return f"{name} was changed (SHA-256 differs)"
    return None


def load(path: Path) -> tuple[State, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """State, tensors by file, and the extras of a verified checkpoint."""
    fields = json.loads((path / "state.json").read_text(encoding="utf-8"))
    extra = fields.pop("extra")
    return State(**fields), {p.stem: load_file(p) for p in path.glob("*.safetensors")}, extra


def at_step(run: RunDir, step: int) -> Path:
    """The checkpoint of a step. Raises RunError if it is gone."""
    path = run.path / "checkpoints" / f"{step:06d}"
    if not path.is_dir():
        raise RunError(Fault(f"the checkpoint of step {step} is missing", where=str(path)))
    return path


def rotate(run: RunDir, keep: int, best_step: int | None) -> None:
    """Drop the oldest by step number; the newest `keep` and the best one stay."""
    paths = sorted(_all(run), key=lambda p: int(p.name))
    for path in paths[:-keep]:
        if int(path.name) != best_step:
            shutil.rmtree(path)


def _tidy(folder: Path) -> None:
    """What a save that was cut short left: the checkpoint it was about to replace is put back, the rest only takes
    room. The run's lock says that nobody is writing here."""
    for path in folder.glob("*.tmp-replaced"):
        target = path.with_name(path.name.partition(".")[0])
        if not target.exists():
            path.rename(target)
    for path in folder.glob("*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def steps(run: RunDir) -> list[int]:
    """The steps that have a checkpoint, whole or not."""
    return [int(path.name) for path in _all(run)]


def _all(run: RunDir) -> list[Path]:
    return [p for p in (run.path / "checkpoints").glob("*") if p.name.isdigit()]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 22), b""):
            digest.update(chunk)
    return digest.hexdigest()
