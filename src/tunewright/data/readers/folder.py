"""Folders of images: one folder per class, with or without train/, val/ and test/ above. Knows no task.

The row's id is its path inside the folder. Nothing is opened here: whether an image decodes is inspection's question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tunewright.data.raw import RawRow, Table, natural, raw_rows, shown
from tunewright.errors import Fault

SUFFIXES = ("/",)  # how a folder is written
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
JUNK = ("thumbs.db", "desktop.ini", "__macosx")
LAYOUT = "one folder per class ({0}/ants/1.jpg, {0}/bees/1.jpg), or the same inside {0}/train/ and {0}/test/"


def read(path: Path) -> Table:
    """All images with their class; `split` says what train/, val/ and test/ say."""
    root = path.resolve()
    table = Table(root=root, columns=("image", "label"))
    if not root.is_dir():
        table.faults.append(Fault("this is a file", root.name, expected=LAYOUT.format("photos")))
        return table
    skipped: Counter[str] = Counter()
    splits = _splits(root, table)
    for folder, split in splits.items():
        for class_folder in _folders(folder, table):
            _add_class(table, class_folder, split, skipped)
    _add_loose(table, list(splits), skipped)
    table.notes += [f"{count} {what} skipped" for what, count in sorted(skipped.items())]
    return table


def _splits(root: Path, table: Table) -> dict[Path, str]:
    """Folders that hold class folders, each with its split; {root: ""} where there is no train/ with folders inside."""
    inside = {folder.name.lower(): folder for folder in _folders(root, table)}
    train = inside.get("train")
    if train is None or not any(_folders(train, table)):  # "train" may be a class, beside "bus"
        return {root: ""}
    found = {folder: SPLITS[name] for name, folder in inside.items() if name in SPLITS}
    used = [f"{folder.name}/ is the {split} set" for folder, split in found.items()]
    table.notes.append(f"the folder is already split: {', '.join(used)}")
    if beside := [folder.name for name, folder in inside.items() if name not in SPLITS]:
        table.notes.append(f"folders beside train/ are not used: {shown(beside)}")
    return found


def _add_class(table: Table, folder: Path, split: str, skipped: Counter[str]) -> None:
    before = len(table.rows)
    for file in _files(folder, table, skipped):
        if file.suffix.lower() not in IMAGES:
            skipped[f"files that are no images ({file.suffix.lower() or 'no suffix'})"] += 1
            continue
        row, where = _place(file, table)
        table.rows.append(RawRow(row, where, {"image": str(file), "label": folder.name}, split))
    if len(table.rows) == before:
        table.notes.append(f'the class folder "{folder.relative_to(table.root)}" holds no images: no such class')


def _add_loose(table: Table, folders: list[Path], skipped: Counter[str]) -> None:
    """Images beside or instead of class folders: without class folders they can be predicted, not learnt."""
    direct = [f for folder in folders for f in sorted(folder.iterdir(), key=lambda f: natural(f.name)) if f.is_file()]
    loose = [f for f in direct if f.suffix.lower() in IMAGES and not _is_junk(f)]
    skipped["hidden files"] += sum(_is_junk(f) for f in direct)
    skipped += Counter()  # drops zeros
    name = table.root.name
    remedy = "To use one of its files, name the file itself." if direct and not loose else ""
    wrong = Fault(
        "no class folders with images",
        f"{name}/",
        expected=LAYOUT.format(name),
        got=_contents(table.root),
        remedy=remedy,
    )
    if table.rows and loose:
        skipped["images that lie outside the class folders and so have no label"] += len(loose)
    elif loose:
        table.columns, table.doubt = ("image",), wrong
        table.rows = raw_rows(RawRow(*_place(f, table), {"image": str(f)}) for f in loose)
    elif not table.rows and not table.broken:
        table.faults.append(wrong)


def _folders(folder: Path, table: Table) -> list[Path]:
    found = [f for f in sorted(folder.iterdir(), key=lambda f: natural(f.name)) if f.is_dir() and not _is_junk(f)]
    return [f for f in found if not _escapes(f, table)]


def _files(folder: Path, table: Table, skipped: Counter[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda f: natural(f.name)):
        if _is_junk(entry):
            skipped["hidden files"] += 1
        elif _escapes(entry, table):
            continue
        elif not entry.is_dir():
            yield entry
        elif entry.is_symlink():
            skipped["links to other folders inside"] += 1
        else:
            yield from _files(entry, table, skipped)


def _is_junk(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in JUNK


def _escapes(path: Path, table: Table) -> bool:
    """Whether a link leads out of the folder; then it is a fault."""
    if not path.is_symlink() or path.resolve().is_relative_to(table.root):
        return False
    row, where = _place(path, table)
    remedy = "Put a copy of the file in its place."
    table.broken[row] = Fault("the link leads out of the folder", where, got=str(path.readlink()), remedy=remedy)
    return True


def _place(path: Path, table: Table) -> tuple[str, str]:
    row = path.relative_to(table.root).as_posix()
    return row, f"{table.root.name}/{row}"


def _contents(root: Path) -> str:
    names = [f.name + ("/" if f.is_dir() else "") for f in sorted(root.iterdir(), key=lambda f: natural(f.name))]
    return shown(names, 5) if names else "an empty folder"
