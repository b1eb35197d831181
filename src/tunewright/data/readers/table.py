"""Tables as text: .csv and .tsv with a header line. Knows no task.

Every cell stays text: "NA", "007" and "null" are what the user wrote. Rows are numbered by the line on which their
record starts.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tunewright.data.raw import RawRow, Table, short
from tunewright.data.texts import Text, read_text
from tunewright.errors import Fault

SUFFIXES = (".csv", ".tsv")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
SAMPLE = 100_000  # characters looked at for the delimiter
Cut = tuple[int, int, list[str] | str]  # first line, last line, cells (or the parser's words where it gave up)


def read(path: Path) -> Table:
    """All rows of the file, and what was wrong with the others."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
    text, notes, faults = read_text(path)
    table = Table(root=path.parent, notes=notes, faults=faults)
    if not text:
        return table
    delimiter = _sniff(text, "\t" if path.suffix.lower() == ".tsv" else ",", notes)
    nuls, lines = _counted(text)
    if nuls:
        notes.append(f"{nuls} NUL character{'s' if nuls > 1 else ''} in the text")
    records = _records(text, delimiter)
    header = next((cells for _, _, cells in records if any(cell.strip() for cell in cells)), [])
    if not isinstance(header, list) or not header:
        problem = f"the header cannot be read: {header}" if header else "the file holds only blank lines"
        table.faults.append(Fault(problem, path.name, expected="a first line with the column names"))
        return table
    table.columns = _columns(header, path.name, table)
    _fill(table, path.name, records, header, delimiter, lines)
    if not (table.rows or table.broken):
        table.faults.append(Fault("the file has a header and no rows", path.name, got=shown_columns(table)))
    table.doubt = _header_doubt(table, path.name, delimiter)
    return table


def _fill(table: Table, name: str, records: Iterator[Cut], header: list[str], delimiter: str, lines: int) -> None:
    blank, wanted = 0, len(header)
    for first, last, cells in records:
        row, where = f"{name}:{first}", f"{name} line {first}"
        if isinstance(cells, str) and last > first:  # nobody knows how many rows it swallowed: no quarantine
            table.faults.append(_misquoted(where, first, last, cells, delimiter))
        elif isinstance(cells, str):
            table.broken[row] = _misquoted(where, first, last, cells, delimiter)
        elif not cells or (wanted > 1 and not any(cell.strip() for cell in cells)):
            blank += 1  # a lone "" in a table of one column is a row
        elif len(cells) != wanted:
            table.broken[row] = _miscounted(table, where, cells, delimiter, last >= lines)
        elif cells == header:
            table.broken[row] = Fault("the row repeats the header", where, remedy="Were two files joined? Delete it.")
        else:
            table.rows.append(RawRow(row, where, dict(zip(table.columns, cells, strict=True))))
    table.notes += [f"{blank} blank line{'s' if blank > 1 else ''} skipped"] if blank else []


def _counted(text: Text) -> tuple[int, int]:
    """(NUL characters, lines up to the last one with something on it)."""
    nuls = ends = lines = 0
    for piece in text.pieces():
        nuls += piece.count("\0")
        if said := piece.rstrip():
            lines = ends + said.count("\n")
        ends += piece.count("\n")
    return nuls, lines + 1


def _records(text: Text, delimiter: str) -> Iterator[Cut]:
    """All records of the text, blank lines included."""
    with text.open() as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                cells: list[str] | str = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader goes on with the next line
                cells = str(error)
            yield first, reader.line_num, cells


def _sniff(text: Text, usual: str, notes: list[str]) -> str:
    """The delimiter under which most records have as many fields as the header."""
    with text.open() as stream:
        start, is_cut = stream.read(SAMPLE), bool(stream.read(1))
    scores = {}
    for delimiter in DELIMITERS:
        records = list(islice(csv.reader(io.StringIO(start, newline=""), delimiter=delimiter), 51))
        header, *rest = [cells for cells in records if cells] or [[]]
        rest = rest[:-1] if is_cut and len(records) < 51 else rest  # the last one is cut by the sample
        if len(header) > 1:
            share = sum(len(cells) == len(header) for cells in rest) / max(len(rest), 1)
            scores[delimiter] = (share, delimiter == usual, len(header))
    best = max(scores, key=scores.__getitem__, default=usual)
    if best != usual:
        notes.append(f'fields are separated by "{best}" ({DELIMITERS[best]}), not by {DELIMITERS[usual]}: read so')
    return best


def _columns(header: list[str], name: str, table: Table) -> tuple[str, ...]:
    columns = tuple(cell.strip() or f"column {number}" for number, cell in enumerate(header, 1))
    nameless = [column for column, cell in zip(columns, header, strict=True) if not cell.strip()]
    table.notes += [f"the header names no {', '.join(nameless)}; called so here"] if nameless else []
    for column, count in Counter(columns).items():
        if count > 1:
            remedy = "Give each column its own name."
            table.faults.append(Fault(f"the header names the same column {count} times", name, column, remedy=remedy))
    return columns


def shown_columns(table: Table) -> str:
    return short(", ".join(table.columns))


def _misquoted(where: str, first: int, last: int, saw: str, delimiter: str) -> Fault:
    lines = f" (lines {first} to {last} were read as one row)" if last > first else ""
    if "end of data" in saw:
        problem = f"a quotation mark opens here and is never closed{lines}"
    else:
        problem = f"a closing quotation mark is not followed by {DELIMITERS[delimiter]} or line end{lines}"
    return Fault(problem, where, remedy='Close it, or write a quotation mark inside a text twice: "he said ""no""".')


def _miscounted(table: Table, where: str, cells: list[str], delimiter: str, last: bool) -> Fault:
    many = len(cells) > len(table.columns)
    remedy = "A field is missing."
    if many:
        example = f"yes{delimiter} really"
        remedy = f'A text that holds a {DELIMITERS[delimiter]} must stand in quotation marks: "{example}".'
    elif last:
        remedy = "This is the last line: the file may be cut off."
    return Fault(
        f"the row has too {'many' if many else 'few'} fields",
        where,
        expected=f"{len(table.columns)} ({shown_columns(table)})",
        got=f"{len(cells)} ({short(' | '.join(cells))})",
        remedy=remedy,
    )


def _header_doubt(table: Table, name: str, delimiter: str) -> Fault | None:
    """The first line may be data: a name is a number or a sentence, or stands among the values beneath it."""
    for column in table.columns:
        beneath = any(row.values[column] == column for row in table.rows[:1000])
        if NUMBER.fullmatch(column) or len(column.split()) > 5 or beneath:
            return Fault(
                "the first line looks like data, not like column names",
                f"{name} line 1",
                got=short(" | ".join(table.columns)),
                remedy=f"Put a line with the column names before it, such as: text{delimiter}label",
            )
    return None
