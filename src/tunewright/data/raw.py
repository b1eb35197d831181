"""What a reader hands over: rows as they stand in the file, each with its place, and all that was odd.

Knows no task and no file format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from tunewright.data.rows import Rows, Store
from tunewright.errors import Fault

SPOKEN = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "a truth value", str: "a text"}
Remarks = Counter[tuple[str, str]]  # (sentence with {} for the details, detail) -> rows it is said of


class BadValue(Exception):
    """A value that its kind refuses; becomes a Fault where row and field are known. `problem` holds no value."""

    def __init__(self, problem: str, *, expected: str = "", got: str = "", remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.expected, self.got, self.remedy = problem, expected, got, remedy


@dataclass(slots=True)
class RawRow:
    """One row before any task has looked at it."""

    row: str  # its id: "train.csv:3", inside a folder "train/ants/3.jpg"
    where: str  # the same for people: "train.csv line 3"
    values: dict[str, Any]
    split: str = ""  # "train", "validation" or "test" where the folder itself says so


@dataclass
class Table:
    """A file or folder as it was read."""

    root: Path  # paths inside the rows start here and may not leave it
    columns: tuple[str, ...] = ()
    rows: Rows = field(default_factory=lambda: raw_rows())  # of RawRow
    notes: list[str] = field(default_factory=list)  # every guess and everything skipped
    faults: list[Fault] = field(default_factory=list)  # of the source as a whole
    broken: dict[str, Fault] = field(default_factory=dict)  # rows that could not be read, by id; not in `rows`
    doubt: Fault | None = None  # why a column may seem to be missing; reported only if one is
    sha256: str = ""  # of the rows, where they came from no file whose bytes could be hashed


def raw_rows(rows: Iterable[RawRow] = ()) -> Rows:
    """A list of raw rows that may be long."""
    store = Store(lambda row: [row.row, row.where, row.values, row.split], lambda parts: RawRow(*parts))
    return Rows(rows, store=store)


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key for the order a person expects: 1, 2, 10."""
    parts: list[str | int] = list(re.split(r"(\d+)", name.casefold()))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts, name


def plain(value: Any) -> Any:
    """A value of a typed table as JSON knows it: text, number, truth value, null, list or object.

    Dates become ISO text, exact decimals their digits as text. Raises UnicodeDecodeError for bytes that are no UTF-8.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, (Decimal, timedelta)):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def shown(values: Sequence[str], most: int = 8) -> str:
    """A list for people: the first few, the rest counted."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more


def short(value: Any, most: int = 60) -> str:
    """A value in one line that never floods the screen."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def spoken(value: Any) -> str:
    """A value with its kind in words: `a number (5)`."""
    return f"{SPOKEN.get(type(value), type(value).__name__)} ({short(value)})"
