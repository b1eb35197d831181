"""One folder per run: the folder is the record, there is no other database.

Knows file names and how to write them so that they are whole or absent. Does not know what stands in them.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.errors import Fault, RecipeError, RunError
from tunewright.recipe import Recipe

CHANGEABLE = ("data", "train", "evaluate", "export")  # what may change in a run under way; the model's shape may not
FINISHED = "README.md"  # written last: a run that has it is finished


@dataclass(frozen=True)
class RunDir:
    """A run's folder. Its files are listed in docs/the-run-folder.md."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe: Recipe, allow_change: bool = False) -> RunDir:
        """Make the folder, or take an unfinished one of the same recipe.

        allow_change: data, training and evaluation may differ; the recipe given now is then the run's.
        Raises RunError naming the differences if it holds a run of another recipe, or files that are no run.
        """
        run = cls(path)
        if path.is_file():
            raise RunError(Fault("a file stands where the run folder should be", where=str(path)))
        if run._begun:
            run._same_recipe(recipe, allow_change)
        elif path.is_dir() and not run._hardly_begun:
            raise RunError(
                Fault("the folder holds files that are no run", where=str(path), remedy="Choose another output_dir.")
            )
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            sync(path.parent)
            run.write_text("recipe.yaml.tmp", "")
            (path / "recipe.yaml.tmp").unlink()
            if not (path / "recipe.yaml").is_file():
                run.write_text("recipe.yaml", recipe.text())
        except OSError as error:
            raise RunError(Fault(f"the folder cannot be written: {error.strerror}", where=str(path))) from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run. Raises RunError if there is none."""
        path = Path(path)
        if not (path / "recipe.yaml").is_file():
            near = sorted(p.parent.name for p in path.parent.glob("*/recipe.yaml")) if path.parent.is_dir() else []
            remedy = f"Runs beside it: {', '.join(near)}." if near else "Give a folder that `tunewright train` made."
            raise RunError(Fault("not a run folder (no recipe.yaml)", where=str(path), remedy=remedy))
        return cls(path)

    def _same_recipe(self, recipe: Recipe, allow_change: bool) -> None:
        try:
            old = self.recipe()
        except RecipeError as error:
            raise RunError(Fault(f"its recipe.yaml cannot be read ({error})", where=str(self.path))) from error
        if old.digest() == recipe.digest():
            return
        before, after = _flat(old.tree()), _flat(recipe.tree())
        keys = sorted(k for k in before | after if before.get(k) != after.get(k))
        changes = ", ".join(f"{k}: {before.get(k)!r} there, {after.get(k)!r} now" for k in keys)
        opened = (self.path / "evidence.json").is_file()  # what was measured would be of another model
        can = all(k.partition(".")[0] in CHANGEABLE for k in keys) and not opened
        if allow_change and can:
            with self.locked():
                self._change_recipe(old, recipe, changes)
            return
        remedy = "Choose another output_dir, or --again for a fresh folder beside it"
        remedy += "; --allow-change continues all the same." if can else "."
        raise RunError(Fault(f"holds a run of another recipe ({changes})", where=str(self.path), remedy=remedy))

    def _change_recipe(self, old: Recipe, new: Recipe, changes: str) -> None:
        """The change is written down first: checkpoints of a recipe that nobody knows would not be taken."""
        lines = [*self.lines("changes"), {"was": old.digest(), "is": new.digest(), "changes": changes}]
        try:
            self.write_text("changes.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            self.write_text("recipe.yaml", new.text())
        except OSError as error:
            raise RunError(Fault(f"the folder cannot be written: {error.strerror}", where=str(self.path))) from error

    def recipe(self) -> Recipe:
        return Recipe.read(self.path / "recipe.yaml")[0]

    @property
    def _begun(self) -> bool:
        """A lone recipe.yaml may be the user's own, which must not be written over."""
        own = ("checkpoints", "evidence.json")
        return (self.path / "recipe.yaml").is_file() and any((self.path / name).exists() for name in own)

    @property
    def _hardly_begun(self) -> bool:
        """Nothing but what a start that was cut short leaves behind."""
        places = [p for p in self.path.iterdir() if not p.name.startswith("recipe.yaml.")]
        return not places or (places == [self.path / "checkpoints"] and not any(places[0].iterdir()))

    @property
    def finished(self) -> bool:
        return (self.path / FINISHED).is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time. The lock is the kernel's: a killed process leaves none behind."""
        handle = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(handle, 500, 0).decode(errors="replace").strip() or "another process"
                raise RunError(Fault(f"in use by {holder}", where=str(self.path))) from error
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            with contextlib.suppress(OSError):  # on a full disk the holder has no name, but the lock holds
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}, started {now}".encode(), 0)
            yield
        finally:
            os.close(handle)

    # ---------------------------------------------------------------- small files
    def append(self, name: str, *rows: Mapping[str, Any]) -> None:
        """Add JSON lines to `<name>.jsonl`: all of them, or none where the disk is full (OSError)."""
        path = self.path / f"{name}.jsonl"
        before = path.stat().st_size if path.exists() else 0
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if path.exists():
                os.truncate(path, before)
            raise

    def rewind(self, name: str, step: int) -> None:
        """Forget the lines after a step: a resumed run writes them again. A line cut by a kill is forgotten too."""
        path = self.path / f"{name}.jsonl"
        if not path.is_file():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        self.write_text(path.name, "".join(f"{line}\n" for line in kept))

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def write_text(self, name: str, text: str | Iterable[str]) -> None:
        """Whole or not at all; in pieces where it should never stand in memory whole."""
        path = self.path / name
        beside = path.with_name(path.name + ".partial")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync(self.path)

    def write_json(self, name: str, value: Any) -> None:
        pieces = json.JSONEncoder(indent=1, ensure_ascii=False, allow_nan=False).iterencode(value)
        self.write_text(name, itertools.chain(pieces, ["\n"]))

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def whole_folder(self, name: str) -> Iterator[Path]:
        """A folder to fill; it takes its name, and replaces the old one, only when the block has ended well."""
        beside = self.path / f"{name}.partial"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            for path in (*beside.rglob("*"), beside):
                sync(path)
        except Exception:
            shutil.rmtree(beside, ignore_errors=True)  # half a folder only takes room
            raise
        target = self.path / name
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        sync(self.path)

    def sync(self) -> None:
        """All small files are on the disk: what is written next never stands without them, even if the power fails."""
        for path in (*(p for p in self.path.iterdir() if p.is_file()), self.path):
            sync(path)


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, survives a power cut from now on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fresh_path(path: Path) -> Path:
    """`runs/tickets` -> the first of `runs/tickets-2`, `-3` ... that does not exist."""
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
