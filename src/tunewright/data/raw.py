"""What a reader hands over: rows as they stand in the file, each with its place, and all that was odd.

Knows no task and no file format. Bytes become text here, because every text reader owes them the same care.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from tunewright.errors import Fault

BOMS = (  # the longer ones first: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)

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
    rows: list[RawRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # every guess and everything skipped
    faults: list[Fault] = field(default_factory=list)  # of the source as a whole
    broken: dict[str, Fault] = field(default_factory=dict)  # rows that could not be read, by id; not in `rows`
    doubt: Fault | None = None  # why a column may seem to be missing; reported only if one is
    sha256: str = ""  # of the rows, where they came from no file whose bytes could be hashed


def read_text(path: Path) -> tuple[str, list[str], list[Fault]]:
    """A text file as (text, notes, faults); UTF-8, or what its byte order mark says.

    Where bytes are not valid the text comes all the same, with U+FFFD in their place, so that other faults are found.
    """
    if path.is_dir():
        return "", [], [Fault("this is a folder", where=path.name, expected="a file")]
    try:
        raw = path.read_bytes()
    except OSError as error:
        return "", [], [Fault(f"the file cannot be read ({error.strerror})", where=path.name)]
    if not raw:
        return "", [], [Fault("the file is empty (0 bytes)", where=path.name, remedy="Was it copied to its end?")]
    mark, encoding, spoken = next((b for b in BOMS if raw.startswith(b[0])), (b"", "utf-8", ""))
    notes = [f"begins with a byte order mark: read as {spoken}"] if mark else []
    if not mark and raw[:1000].count(0) > len(raw[:1000]) * 0.3:
        problem = "every second byte is NUL: this looks like UTF-16 without a byte order mark"
        return "", [], [Fault(problem, path.name, expected="UTF-8", remedy=_convert("UTF-16LE", path))]
    try:
        return raw.decode(encoding), notes, []
    except UnicodeDecodeError as error:
        return raw.decode(encoding, errors="replace"), notes, [_undecodable(path, raw, error)]


def _undecodable(path: Path, raw: bytes, error: UnicodeDecodeError) -> Fault:
    start, line = error.start, raw.count(b"\n", 0, error.start) + 1
    where = f"{path.name} line {line}"
    problem = f"byte 0x{raw[start]:02x} at offset {start} is not valid {error.encoding.upper()}"
    if error.end >= len(raw) and error.reason in ("unexpected end of data", "truncated data"):
        return Fault(problem, where, remedy="The file ends inside a character: it may be cut off.")
    bad = sum(not _is_utf8(piece) for piece in raw.split(b"\n")) if error.encoding.startswith("utf-8") else 1
    around = raw[max(0, start - 15) : start + 15].decode("cp1252", errors="replace").strip()
    return Fault(
        problem,
        where,
        expected="UTF-8",
        got=f'{bad} such line{"s" if bad > 1 else ""}; read as latin-1 the place says "{" ".join(around.split())}"',
        remedy=f"It looks like latin-1 (cp1252). {_convert('CP1252', path)}",
    )


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _convert(encoding: str, path: Path) -> str:
    return f"Save it as UTF-8, or convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"


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
