"""One given file or folder on its way from path to checked records.

Finds the reader by file name in data/readers, maps the columns, checks each value. Knows no other source: what holds
between them (copies, labels, splits) is records.py.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunewright import find
from tunewright.data import inspection
from tunewright.data.columns import match
from tunewright.data.raw import RawRow, Table, raw_rows, shown
from tunewright.data.rows import Rows, chosen, plain
from tunewright.errors import Fault, nearest
from tunewright.recipe_text import HUB_DATA, SCHEME

if TYPE_CHECKING:
    from tunewright.contracts import Field, Record

SPLITS = ("train", "validation", "test")


@dataclass
class Pool:
    """The sound rows of all sources, and beside each what the checks ask of it: by place, so that nobody reads twice.

    Texts that come back (a label, a split) are one object, so a row costs a pointer here.
    """

    rows: Rows = field(default_factory=Rows)  # of Record
    splits: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # "" where the task has none
    groups: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)

    def add(self, record: Record, split: str, label: str, group: str) -> None:
        self.rows.append(record)
        for held, text in ((self.splits, split), (self.labels, label), (self.groups, group)):
            held.append(self.known.setdefault(text, text))

    def of(self, places: np.ndarray, split: str) -> np.ndarray:
        """Those of the places whose row is in this split."""
        return np.array([place for place in places.tolist() if self.splits[place] == split], dtype=np.int64)


@dataclass
class Source:
    """One given file or folder on its way from table to records."""

    split: str  # the recipe's key it was given under
    path: Path
    format: str
    table: Table
    columns: dict[str, str] = field(default_factory=dict)
    pool: Pool = field(default_factory=Pool)  # where its sound rows are, perhaps beside those of other sources
    places: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # which of the pool's rows they are
    faults: list[Fault] = field(default_factory=list)  # that stop in any case
    bad: dict[str, list[Fault]] = field(default_factory=dict)  # rows that cannot be used, by id
    notes: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    inner: set[str] = field(default_factory=set)  # splits that the source itself tells of
    loners: int = 0  # sound rows that belong to no group
    partial: list[tuple[str, Record]] = field(default_factory=list)  # (split, bad row with the fields that are right)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def num_read(self) -> int:
        return len(self.table.rows) + len(self.table.broken)

    @property
    def records(self) -> Sequence[Record]:
        return plain(chosen(self.pool.rows, self.places))

    def drop(self, places: np.ndarray, reason: str) -> None:
        """Take rows out and count them."""
        self.places = np.setdiff1d(self.places, places, assume_unique=True)
        self.dropped[reason] += len(places)


def open_source(split_name: str, place: str, format: str | None, pool: Pool | None = None) -> Source:
    path = Path(place)
    where = f"data.{split_name}" if split_name in SPLITS else split_name
    source = Source(split_name, path, format or "", Table(root=path.parent), pool=pool or Pool())
    on_hub = not path.exists() and (format == "hub" or _is_hub_id(path))
    if not (path.exists() or on_hub):
        source.faults.append(_missing(where, place, path))
        return source
    source.format, fault = _format(path, "hub" if on_hub else format, where)
    if fault:
        source.faults.append(fault)
        return source
    module = importlib.import_module(f"tunewright.data.readers.{source.format.replace('-', '_')}")
    source.table = module.read(path)
    source.notes += source.table.notes
    source.faults += source.table.faults
    return source


def _format(path: Path, format: str | None, where: str) -> tuple[str, Fault | None]:
    """The reader's name: the recipe's word, or the one that lists the suffix ("/" is a folder's)."""
    known = find.names("data/readers")
    if format:
        unknown = Fault(
            f'unknown format "{format}"',
            where="data.format",
            expected=f"one of {', '.join(known)}",
            remedy=nearest(format, known),
        )
        return format, None if format.replace("_", "-") in known else unknown
    if path.is_dir() and (own := next((name for name in known if _reader_claims(name, path)), "")):
        return own, None
    suffix = "/" if path.is_dir() else path.suffix.lower()
    offers = {name: suffixes(name) for name in known}
    name = next((name for name, suffixes in offers.items() if suffix in suffixes), "")
    readable = ", ".join(s for suffixes in offers.values() for s in suffixes if s != "/")
    return name, None if name else Fault(
        f'no reader knows the suffix "{suffix}"',
        where=where,
        expected=f"a folder, or a file ending in {readable}",
        got=path.name,
        remedy=f"Save it in one of these, or name what it is: data.format={known[-1]}",
    )


def _reader_claims(name: str, folder: Path) -> bool:
    """A reader may know its folders by what lies in them: it then has a function `claims`."""
    module = importlib.import_module(f"tunewright.data.readers.{name.replace('-', '_')}")
    return hasattr(module, "claims") and module.claims(folder)


def _is_hub_id(path: Path) -> bool:
    """Whether a path that leads nowhere is meant as `org/name#config:split` and not as a file that is missing.

    It is a missing file where `org` is a folder here, or where the name ends like a file that a reader knows.
    """
    known = {suffix for name in find.names("data/readers") for suffix in suffixes(name)}
    return bool(HUB_DATA.fullmatch(str(path))) and not path.parent.is_dir() and path.suffix.lower() not in known


def suffixes(name: str) -> tuple[str, ...]:
    return importlib.import_module(f"tunewright.data.readers.{name.replace('-', '_')}").SUFFIXES


def _missing(where: str, place: str, path: Path) -> Fault:
    if SCHEME.match(place):
        remedy = "Fetch it first and name the file; rows never make this program open a connection."
        shown_place = re.sub(r"//[^/@]*@", "//...@", place.replace(":/", "://", 1) if "://" not in place else place)
        return Fault("data is read from files here, not over a network", where, got=shown_place, remedy=remedy)
    folder = path.resolve().parent
    while not folder.is_dir():
        folder = folder.parent
    here = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    resolved = f", that is {path.resolve()}" if str(path.resolve()) != place else ""
    contents = f"In {folder} there is {shown(here)}." if here else f"{folder} is empty."
    remedy = f"{nearest(path.name, here)} {contents}".strip()
    return Fault("no such file or folder", where, got=f"{place}{resolved}", remedy=remedy)


def name_apart(sources: Sequence[Source]) -> None:
    """Row ids of one run are unique: sources that share a name, and folders, say which split they were given for."""
    ids = [source.name if not source.path.is_dir() else "/" for source in sources]
    for source, own in zip(sources, ids, strict=True):
        if ids.count(own) == 1:
            continue
        same_name = [other.name for other in sources].count(source.name) > 1

        def place(where: str, prefix: str = f"{source.split}/" if same_name else "") -> str:
            return f"{prefix}{where}"

        table = source.table
        table.rows = raw_rows(replace(r, row=f"{source.split}/{r.row}", where=place(r.where)) for r in table.rows)
        table.broken = {f"{source.split}/{k}": replace(f, where=place(f.where)) for k, f in table.broken.items()}
        source.faults = [replace(f, where=place(f.where)) if f in table.faults else f for f in source.faults]


def read_rows(source: Source, fields: Mapping[str, Field], given: Mapping[str, str], group: str | None) -> None:
    """Map the columns, check every value, and keep what is right in the pool."""
    table, pool = source.table, source.pool
    source.bad = {row: [fault] for row, fault in table.broken.items()}
    if not table.columns or (table.faults and not table.rows):
        source.inner = {row.split for row in table.rows} - {""}
        return
    source.columns, notes, faults = match(table, source.name, fields, given)
    source.notes += notes
    source.faults += faults
    if group and group not in table.columns:
        source.faults.append(_no_group(group, table, source.name))
    used = set(source.columns.values())
    if unused := [column for column in table.columns if column not in used and column != group]:
        source.notes.append(f"columns not used: {shown(unused, 12)}")
    label = label_field(fields)
    remarks: inspection.Remarks = Counter()
    start = len(pool.rows)
    for row in table.rows:
        values, found = inspection.check_row(row, source.columns, fields, table.root, remarks)
        split_name = row.split or source.split
        source.inner |= {row.split} - {""}
        if found:
            source.bad[row.row] = found
            source.partial.append((split_name, {**values, "row": row.row}))
            continue
        extra = {column: value for column, value in row.values.items() if column not in used}
        record = {**values, "row": row.row, "where": row.where, "extra": extra}
        unit = _group_of(row, group)
        source.loners += not unit
        pool.add(record, split_name, values.get(label, ""), unit)
    source.places = np.arange(start, len(pool.rows))
    source.notes += inspection.remark_notes(remarks)


def label_field(fields: Mapping[str, Field]) -> str:
    """The field that is a label, "" where there is none."""
    return next((name for name, f in fields.items() if f.kind == "label"), "")


def _group_of(row: RawRow, group: str | None) -> str:
    value = row.values.get(group) if group else None
    return "" if value is None else str(value).strip()


def _no_group(group: str, table: Table, name: str) -> Fault:
    got, remedy = f"the columns {shown(table.columns, 30)}", nearest(group, table.columns)
    return Fault(f'there is no column "{group}" to group by', name, "data.group", got=got, remedy=remedy)


def file_facts(source: Source) -> dict[str, Any]:
    found = {source.pool.splits[place] for place in source.places}
    return {
        "file": source.name,
        "split": "+".join(s for s in SPLITS if s in found) or source.split,
        "format": source.format,
        "sha256": source.table.sha256 or fingerprint(source.path),
        "rows_read": source.num_read,
        "rows_kept": len(source.places),
        "dropped": dict(source.dropped),
    }


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its sorted list of paths and their SHA-256."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    lines = "".join(f"{p.relative_to(path).as_posix()} {fingerprint(p)}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()
