"""JSON: one object a line (.jsonl, .ndjson), or a list of objects in a .json file. Knows no task.

Rows are numbered by line; in a list, by place. What json.loads lets pass (NaN, a key given twice, half a surrogate
pair) is refused here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from tunewright.data.raw import RawRow, Table, short
from tunewright.data.texts import Text, read_text
from tunewright.errors import Fault

SUFFIXES = (".jsonl", ".ndjson", ".json")
EXAMPLE = '{"text": "a sentence", "label": "good"}'


def read(path: Path) -> Table:
    """All rows of the file, and what was wrong with the others."""
    text, notes, faults = read_text(path)
    table = Table(root=path.parent, notes=notes, faults=faults)
    filled = (line for line in text.lines() if line.strip())
    first, rest = next(filled, "").strip(), next(filled, "")
    filled.close()
    if not first:
        table.faults += [] if faults else [Fault("the file has no rows", path.name, remedy=f"A row is {EXAMPLE}")]
        return table
    by_line = bool(rest) and _parses(first)
    if first.startswith("[") and not by_line:
        _read_list(table, path.name, text.whole())
    elif first.startswith("{") and not by_line and (rest or path.suffix.lower() == ".json") and _parses(text.whole()):
        table.faults.append(_single(path.name, text.whole().strip()))
    else:
        _read_lines(table, path.name, text)
    counts = Counter(name for row in table.rows for name in row.values)
    table.columns = tuple(counts)
    partial = [f'"{name}" ({n})' for name, n in counts.items() if n < len(table.rows)]
    table.notes += [f"of {len(table.rows)} rows only some have {', '.join(partial)}"] if partial else []
    return table


def _read_lines(table: Table, name: str, text: Text) -> None:
    last, careful = 0, False
    for number, line in enumerate(text.lines(), 1):
        last = number if line.strip() else last
        careful = careful or _wants_care(line)
    blank = 0
    for number, line in enumerate(islice(text.lines(), last), 1):
        if not line.strip():
            blank += 1
            continue
        row, where = f"{name}:{number}", f"{name} line {number}"
        try:
            value = DECODER.decode(line.strip())
        except (ValueError, RecursionError) as error:
            table.broken[row] = _broken(where, line, error, number == last)
            continue
        _add(table, row, where, value, careful)
    table.notes += [f"{blank} blank line{'s' if blank > 1 else ''} skipped"] if blank else []


def _read_list(table: Table, name: str, text: str) -> None:
    try:
        values = DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        line, skipped = 1, len(text) - len(text.lstrip())
        if isinstance(error, json.JSONDecodeError):
            line = text.count("\n", 0, skipped + error.pos) + 1
        cut = not text.rstrip().endswith("]")
        table.faults.append(_broken(f"{name} line {line}", text.split("\n")[line - 1], error, cut))
        return
    if not values:
        table.faults.append(Fault("the list has no rows", name, expected=f"a list such as [{EXAMPLE}, ...]"))
    careful = _wants_care(text)
    for number, value in enumerate(values, 1):
        _add(table, f"{name}:{number}", f"{name} row {number}", value, careful)


def _add(table: Table, row: str, where: str, value: Any, careful: bool) -> None:
    if not isinstance(value, dict):
        got = f"{type(value).__name__} {short(json.dumps(value, ensure_ascii=False))}"
        table.broken[row] = Fault("the row is not an object", where, expected=f"an object such as {EXAMPLE}", got=got)
    elif careful and (odd := _oddity(value)):
        table.broken[row] = Fault(odd, where, remedy="JSON for an unknown value is null; better leave the row out.")
    else:
        table.rows.append(RawRow(row, where, value))


def _single(name: str, body: str) -> Fault:
    """The file is one object: perhaps the rows stand inside it, under some key."""
    value = DECODER.decode(body)
    inside = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    remedy = f'The rows seem to stand under "{inside[0]}": save that list alone.' if inside else ""
    got = f"one object with the keys {short(', '.join(value))}"
    expected = f"a list such as [{EXAMPLE}, ...], or one object a line"
    return Fault("the whole file is one object", name, expected=expected, got=got, remedy=remedy)


def _broken(where: str, line: str, error: Exception, last: bool) -> Fault:
    saw, got = "nested too deeply" if isinstance(error, RecursionError) else str(error), short(line)
    if isinstance(error, json.JSONDecodeError):
        saw = f"{error.msg} (character {error.colno})"
        got = short(line[max(0, error.colno - 40) :]) if len(line) > 60 else got
    cut = "This is where the file ends: it may be cut off." if last else ""
    problem = f"the text is no valid JSON: {saw}"
    return Fault(problem, where, expected=f"an object such as {EXAMPLE}", got=got, remedy=cut)


def _parses(text: str) -> bool:
    try:
        DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f'the key "{twice}" stands twice in one object')
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _wants_care(text: str) -> bool:
    """Whether any row can hold what `_oddity` looks for; walking through every value costs more than reading it."""
    return any(sign in text for sign in ("NaN", "Infinity", "\\ud", "\\uD"))


def _oddity(value: Any) -> str:
    if isinstance(value, str):
        lone = not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value)
        return "a character is half of a surrogate pair (\\ud800 to \\udfff)" if lone else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{value} is no JSON number"
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((odd for item in inside if (odd := _oddity(item))), "")
