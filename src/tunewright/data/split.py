"""Rows held out by their id: the same rows whatever their order, no copy and no group on both sides.

Pure functions of ids, keys and a seed. Knows no file and no kind of value.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunewright.contracts import Record

Trait = Callable[["Record"], str]


def split(
    records: Sequence[Record],
    share: float,
    *,
    seed: int,
    key: Trait,
    stratify: Trait | None = None,
    group: Trait | None = None,
) -> tuple[list[Record], list[Record]]:
    """(kept, held out), both in the given order.

    share: in (0, 1), of each class, within rounding; classes too small for that share the remainder. At least one
           row is held out, and each class keeps at least one.
    key:   rows with the same key are copies.   group: rows with the same value belong together; "" belongs to none.
    Nothing is held out where the rows cannot be parted: one row, or all of them copies or one group.
    """
    of = stratify or (lambda record: "")
    kept = Counter(of(record) for record in records)
    places = _places(kept, share, seed)
    units = sorted(_units(records, key, group), key=lambda unit: min(_rank(seed, r["row"]) for r in unit))
    classes = [Counter(of(record) for record in unit) for unit in units]
    held: set[str] = set()

    def hold(number: int) -> None:
        if all(kept[name] > n for name, n in classes[number].items()):
            places.subtract(classes[number])
            kept.subtract(classes[number])
            held.update(record["row"] for record in units[number])

    for number in range(len(units)):
        if _cost(classes[number], places) < 0:
            hold(number)
    if not held:  # every unit is larger than its share: the one that goes furthest towards it, or least beyond
        for number in sorted(range(len(units)), key=lambda number: _cost(classes[number], places)):
            if not held:
                hold(number)
    return [r for r in records if r["row"] not in held], [r for r in records if r["row"] in held]


def nested(
    records: Sequence[Record], count: int, *, seed: int, stratify: Trait | None = None, group: Trait | None = None
) -> list[Record]:
    """`count` of the records, in the given order; those of a smaller count are always among them.

    Every class keeps its share within a row, and its first row comes before any second one. Rows of one group come
    one after the other within their class, so that few rows are few groups.
    """
    of, unit = stratify or (lambda record: ""), group or (lambda record: "")
    classes: dict[str, list[Record]] = defaultdict(list)

    def chance(record: Record) -> tuple[str, str]:
        return _rank(seed, f"group {unit(record) or record['row']}"), _rank(seed, f"limit {record['row']}")

    for record in sorted(records, key=chance):
        classes[of(record)].append(record)
    # by how much of its class stands before a row
    places = [(i / len(rows), _rank(seed, f"limit {r['row']}"), r["row"]) for rows in classes.values()
              for i, r in enumerate(rows)]  # fmt: skip
    kept = {row for _, _, row in sorted(places)[:count]}
    return [record for record in records if record["row"] in kept]


def _rank(seed: int, text: str) -> str:
    """Chance that is the same on every machine: Python's own hash is salted."""
    return hashlib.sha256(f"{seed}\x1f{text}".encode()).hexdigest()


def _places(counts: Counter[str], share: float, seed: int) -> Counter[str]:
    """Rows to hold out of each class: its share rounded down, the rest to the largest remainders."""
    exact = {name: count * share for name, count in counts.items()}
    places = Counter({name: int(places) for name, places in exact.items()})
    left = int(sum(exact.values()) + 0.5) - places.total()
    for name in sorted(exact, key=lambda name: (places[name] - exact[name], _rank(seed, name)))[:left]:
        places[name] += 1
    return places


def _cost(classes: Counter[str], places: Counter[str]) -> int:
    """By how much holding these rows out moves away from (negative: towards) the places still open."""
    return sum(abs(places[name] - n) - abs(places[name]) for name, n in classes.items())


def _units(records: Sequence[Record], key: Trait, group: Trait | None) -> list[list[Record]]:
    """Rows that must stay together: chained by a shared key or a shared group."""
    by_key: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_key[key(record)].append(record)
    if group is None:
        return list(by_key.values())
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def top(name: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for same, rows in by_key.items():
        for value in filter(None, map(group, rows)):
            parent[top(("key", same))] = top(("group", value))
    units: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for same, rows in by_key.items():
        units[top(("key", same))] += rows
    return list(units.values())
