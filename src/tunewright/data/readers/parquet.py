"""Parquet: one .parquet file, through pyarrow. Knows no task.

Values come as they are stored: texts stay texts, numbers numbers, nulls nulls. Rows are numbered from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunewright.data.raw import RawRow, Table, plain, short
from tunewright.errors import Fault

SUFFIXES = (".parquet",)
ROWS_AT_ONCE = 4096  # bounds the memory beside the rows that are kept


def read(path: Path) -> Table:
    """All rows of the file, and what was wrong with the others."""
    import pyarrow
    from pyarrow import parquet

    table = Table(root=path.parent)
    if not path.is_file():
        table.faults.append(Fault("this is a folder", where=path.name, expected="a file"))
        return table
    if path.stat().st_size == 0:
        table.faults.append(Fault("the file is empty (0 bytes)", path.name, remedy="Was it copied to its end?"))
        return table
    try:
        with parquet.ParquetFile(path) as file:
            table.columns = tuple(file.schema_arrow.names)
            twice = [name for name, count in Counter(table.columns).items() if count > 1]
            table.faults += [Fault("two columns have this name", path.name, name) for name in twice]
            if not twice:
                _fill(table, path.name, file.iter_batches(batch_size=ROWS_AT_ONCE))
    except (pyarrow.ArrowException, OSError) as error:
        table.faults.append(_damaged(path, error))
        return table
    if not (table.rows or table.broken or table.faults):
        table.faults.append(Fault("the file has columns and no rows", path.name, got=short(", ".join(table.columns))))
    return table


def _fill(table: Table, name: str, batches: Iterator[Any]) -> None:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            row, where = f"{name}:{number}", f"{name} row {number}"
            try:
                table.rows.append(RawRow(row, where, {column: plain(value) for column, value in values.items()}))
            except UnicodeDecodeError as error:
                got = short(error.object[:20])
                table.broken[row] = Fault("a value is bytes and no UTF-8 text", where, expected="a text", got=got)


def _damaged(path: Path, error: Exception) -> Fault:
    with path.open("rb") as file:
        begins = file.read(4)
    cut = begins == b"PAR1"  # the table of contents stands at a Parquet file's end
    return Fault(
        "the Parquet file is damaged" if cut else "this is no Parquet file",
        path.name,
        got=f"{path.stat().st_size} bytes, beginning {begins!r} ({short(error, 100)})",
        remedy="It may be cut off: copy it again." if cut else "Is the suffix right?",
    )
