"""Which column of the user's is which field of the task. Knows names and shapes, never a value's content.

The recipe's word comes first, then the exact name, the name in other case, the names people use, and last a guess by
shape where only one column can be meant. A name that is nearly right is never guessed: it is asked about.
A kind may be made of several columns (FORMATS): the recipe then maps its parts by their names.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunewright.data import chat
from tunewright.data.raw import Table, shown
from tunewright.errors import Fault, nearest

if TYPE_CHECKING:
    from tunewright.contracts import Field

MANY_CLASSES = 50  # past this, and with more than half of the rows each its own: no label
LOOKED_AT = 1000  # rows whose values decide the shape
FORMATS = {"conversation": chat.FORMATS, "opening": chat.OPENINGS}  # kinds made of several columns


def match(
    table: Table, name: str, fields: Mapping[str, Field], given: Mapping[str, str]
) -> tuple[dict[str, str], list[str], list[Fault]]:
    """(task field -> column, notes on all that is not the exact name, faults)."""
    found: dict[str, str] = {}
    notes: list[str] = []
    known = names(fields)
    faults = [_no_field(key, known) for key in given if key not in known]
    for key in fields:
        if fields[key].kind in FORMATS:
            parts, said, wrong = _match_format(fields[key].kind, table, name, given)
            found, notes, faults = found | parts, notes + said, faults + wrong
        elif key in given and given[key] in table.columns:
            found[key] = given[key]
        elif key in given:
            faults.append(_no_column(key, given[key], table, name))
        elif column := _by_name(key, fields[key].aliases, table.columns):
            found[key] = column
            notes += [] if column == key else [f'column "{column}" is read as {key}']
    lost = [key for key in fields if key not in found and key not in given and fields[key].kind not in FORMATS]
    if lost and table.doubt:
        return found, notes, [*faults, table.doubt]
    for key in lost:
        left = [column for column in table.columns if column not in found.values()]
        column = _by_shape(key, fields[key].kind, left, table) if len(lost) == 1 else ""
        if column:
            found[key] = column
            notes.append(f'column "{column}" is read as {key}, as no other can be meant (or set data.columns.{key})')
        else:
            faults.append(_missing(key, left, table, name))
    return found, notes, faults


def _by_name(key: str, aliases: Sequence[str], columns: Sequence[str]) -> str:
    if key in columns:
        return key
    folded = {column.casefold(): column for column in reversed(columns)}
    return next((folded[name.casefold()] for name in (key, *aliases) if name.casefold() in folded), "")


def _by_shape(key: str, kind: str, left: Sequence[str], table: Table) -> str:
    """The one column left whose values could be this field; "" if there are none or several."""
    if nearest(key, left):
        return ""
    rows = table.rows[:LOOKED_AT]
    fitting = [column for column in left if SHAPES[kind]([row.values.get(column) for row in rows])]
    return fitting[0] if len(fitting) == 1 else ""


def _like_text(values: Sequence[Any]) -> bool:
    words = [len(value.split()) for value in values if isinstance(value, str)]
    return len(words) == len(values) > 0 and sum(words) > 2 * len(words)


def _like_label(values: Sequence[Any]) -> bool:
    scalar = all(isinstance(value, (str, int)) for value in values)
    return scalar and 1 < len(set(values)) <= max(2, min(MANY_CLASSES, len(values) // 2))


def _like_image(values: Sequence[Any]) -> bool:
    endings = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
    return len(values) > 0 and all(isinstance(value, str) and value.lower().endswith(endings) for value in values)


SHAPES: dict[str, Callable[[Sequence[Any]], bool]] = {"text": _like_text, "label": _like_label, "image": _like_image}


# ------------------------------------------------------- kinds of several columns
def names(fields: Mapping[str, Field]) -> list[str]:
    """What `data.columns` may map: the fields, and in place of a field made of several columns its parts."""
    return [
        name for key, field in fields.items() for name in (names_of(field.kind) if field.kind in FORMATS else [key])
    ]


def _match_format(
    kind: str, table: Table, name: str, given: Mapping[str, str]
) -> tuple[dict[str, str], list[str], list[Fault]]:
    """(part -> column, notes, faults) of the one format in which all rows are written."""
    known = {part for shape in FORMATS[kind] for part in shape.parts}
    given = {part: column for part, column in given.items() if part in known}
    if lost := [part for part, column in given.items() if column not in table.columns]:
        return {}, [], [_no_column(part, given[part], table, name) for part in lost]
    fitting = {}
    for shape in FORMATS[kind]:
        found = {
            part: given.get(part) or _by_name(part, chat.ALIASES.get(part, ()), table.columns) for part in shape.parts
        }
        if given.keys() <= set(shape.parts) and all(found[part] for part in shape.needs):
            fitting[shape.name] = {part: column for part, column in found.items() if column}
    if not fitting:
        return {}, [], [table.doubt or _no_format(kind, given, table, name)]
    needs = {shape.name: shape.needs for shape in FORMATS[kind]}
    rows: dict[str, array[int]] = {}  # format -> places of its rows
    for place, row in enumerate(table.rows):
        there = (f for f, columns in fitting.items() if all(row.values.get(columns[p]) is not None for p in needs[f]))
        rows.setdefault(next(there, ""), array("q")).append(place)
    used = [shape for shape in rows if shape] or [next(iter(fitting))]
    if len(used) > 1:
        return {}, [], [_mixed({shape: rows[shape] for shape in used}, table, name)]
    columns = fitting[used[0]]
    said = ", ".join(part if part == column else f'{part} ("{column}")' for part, column in columns.items())
    return columns, [f"rows are read as {used[0]}: {said}"], []


def _no_format(kind: str, given: Mapping[str, str], table: Table, name: str) -> Fault:
    ways = "; ".join(" and ".join(shape.needs) for shape in FORMATS[kind])
    folded = {column.casefold(): column for column in table.columns}
    meant = {
        part: given.get(part) or next((folded[n] for n in (part, *others) if n in folded), "")
        for part, others in chat.MAPPABLE.items()
    }
    remedy = next((near for column in table.columns if (near := nearest(column, names_of(kind)))), "")
    if all(meant.values()):
        remedy = "Are these they? " + " ".join(f"data.columns.{part}={column}" for part, column in meant.items())
    return Fault(
        "the columns are no known way to write conversations" + (f" with {', '.join(given)}" if given else ""),
        where=name,
        expected=f"one of: {ways}",
        got=f"the columns {shown(table.columns, 30)}",
        remedy=remedy or "Map them: data.columns.prompt=... data.columns.completion=...",
    )


def names_of(kind: str) -> list[str]:
    return list(dict.fromkeys(part for shape in FORMATS[kind] for part in shape.parts))


def _mixed(rows: Mapping[str, Sequence[int]], table: Table, name: str) -> Fault:
    def said(found: Sequence[int]) -> str:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        places = ", ".join(table.rows[place].where for place in found[:3])
        return f"{len(found)} row{'s' if len(found) > 1 else ''} ({places}{more})"

    got = "; ".join(f"{shape}: {said(found)}" for shape, found in rows.items())
    remedy = "Split the file by format, or name the columns of one of them under data.columns."
    return Fault("rows are written in different formats", name, expected="one format in a file", got=got, remedy=remedy)


# ---------------------------------------------------------------------- faults
def _no_field(key: str, known: list[str]) -> Fault:
    return Fault(
        f'the task has no field "{key}"',
        where=f"data.columns.{key}",
        expected=f"one of {', '.join(known)}",
        remedy=nearest(key, known),
    )


def _no_column(key: str, column: str, table: Table, name: str) -> Fault:
    near = nearest(column, table.columns)
    return Fault(
        f'there is no column "{column}"',
        where=name,
        field=key,
        expected=f"the column that data.columns.{key} names",
        got=f"the columns {shown(table.columns, 30)}",
        remedy=f"{near} Set data.columns.{key}={near.split(chr(34))[1]}" if near else f"Set data.columns.{key}.",
    )


def _missing(key: str, left: Sequence[str], table: Table, name: str) -> Fault:
    near = nearest(key, left)
    column = near.split('"')[1] if near else "the-right-column"
    return Fault(
        f"no column is the {key}",
        where=name,
        field=key,
        expected=f'a column "{key}"',
        got=f"the columns {shown(table.columns, 30)}",
        remedy=f"{near or 'Which one is it?'} Map it: data.columns.{key}={column}",
    )
