"""Rows held out by their id: the same rows whatever their order, no copy and no group on both sides.

Pure functions of ids, keys and a seed. Knows no file and no kind of value. What it needs of a row is a few numbers in
arrays: there may be millions of rows, and they may lie on a disk.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunewright.data.rows import chosen

if TYPE_CHECKING:
    from tunewright.contracts import Record

Trait = Callable[["Record"], str]


# ------------------------------------------------------------------ of records
def split(
    records: Sequence[Record],
    share: float,
    *,
    seed: int,
    key: Trait,
    stratify: Trait | None = None,
    group: Trait | None = None,
) -> tuple[Sequence[Record], Sequence[Record]]:
    """(kept, held out), both in the given order; `held_out` says which.

    key: rows with the same key are copies.   stratify: their class.   group: rows with the same value belong together.
    """
    held = held_out(
        (r["row"] for r in records), numbered(map(key, records)), share, seed=seed,
        classes=stratify and list(map(stratify, records)), groups=group and list(map(group, records)),
    )  # fmt: skip
    return chosen(records, np.flatnonzero(~held)), chosen(records, np.flatnonzero(held))


def nested(
    records: Sequence[Record], count: int, *, seed: int, stratify: Trait | None = None, group: Trait | None = None
) -> Sequence[Record]:
    """`count` of the records, in the given order; `drawn` says which."""
    taken = drawn(
        [r["row"] for r in records], count, seed=seed,
        classes=stratify and list(map(stratify, records)), groups=group and list(map(group, records)),
    )  # fmt: skip
    return chosen(records, np.flatnonzero(taken))


def numbered(values: Iterable[str]) -> np.ndarray:
    """(N,) int64: equal where the values are."""
    known: dict[str, int] = {}
    return np.fromiter((known.setdefault(value, len(known)) for value in values), dtype=np.int64)


# ------------------------------------------------------------------- of arrays
def held_out(
    ids: Iterable[str],
    contents: np.ndarray,
    share: float,
    *,
    seed: int,
    classes: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """(N,) bool: which rows are held out.

    contents: (N,) int; rows with the same number are copies.   groups: equal values belong together; "" to none.
    share: in (0, 1), of each class, within rounding; classes too small for that share the remainder. At least one
           row is held out, and each class keeps at least one.
    Nothing is held out where the rows cannot be parted: one row, or all of them copies or one group.
    """
    held = np.zeros(len(contents), dtype=bool)
    kept = Counter(classes) if classes is not None else Counter({"": len(contents)})
    places = _places(kept, share, seed)
    order, starts = _units(contents, groups, _ranks(seed, ids))

    def members(number: int) -> list[int]:
        rows: list[int] = order[starts[number] : starts[number + 1]].tolist()
        return rows

    def of(number: int) -> Counter[str]:
        return Counter(classes[row] if classes is not None else "" for row in members(number))

    def hold(number: int, counts: Counter[str]) -> None:
        if all(kept[name] > n for name, n in counts.items()):
            places.subtract(counts)
            kept.subtract(counts)
            held[members(number)] = True

    for number in range(len(starts) - 1):
        counts = of(number)
        if _cost(counts, places) < 0:
            hold(number, counts)
    if not held.any():  # every unit is larger than its share: the one that goes furthest towards it, or least beyond
        for number in sorted(range(len(starts) - 1), key=lambda number: _cost(of(number), places)):
            if not held.any():
                hold(number, of(number))
    return held


def drawn(
    ids: Sequence[str],
    count: int,
    *,
    seed: int,
    classes: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """(N,) bool: `count` of the rows; those of a smaller count are always among them.

    Every class keeps its share within a row, and its first row comes before any second one. Rows of one group come
    one after the other within their class, so that few rows are few groups.
    """
    own = _ranks(seed, (f"limit {row}" for row in ids))
    units = ids if groups is None else [group or row for group, row in zip(groups, ids, strict=True)]
    beside = _ranks(seed, (f"group {unit}" for unit in units))
    sizes = Counter(classes) if classes is not None else Counter({"": len(ids)})
    before: Counter[str] = Counter()
    place = np.zeros(len(ids))  # by how much of its class stands before a row
    for row in np.lexsort((own[:, 1], own[:, 0], beside[:, 1], beside[:, 0])):
        name = classes[row] if classes is not None else ""
        place[row] = before[name] / sizes[name]
        before[name] += 1
    taken = np.zeros(len(ids), dtype=bool)
    taken[np.lexsort((own[:, 1], own[:, 0], place))[:count]] = True
    return taken


def _ranks(seed: int, texts: Iterable[str]) -> np.ndarray:
    """(N, 2): chance that is the same on every machine: Python's own hash is salted. Sorts like the whole digest."""
    held = bytearray()
    for text in texts:
        held += hashlib.sha256(f"{seed}\x1f{text}".encode()).digest()[:16]
    return np.frombuffer(held, dtype=">u8").reshape(-1, 2).astype(np.uint64)


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


def _units(contents: np.ndarray, groups: Sequence[str] | None, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, unit by unit in the order of their lowest ranks; where each unit begins, and the end).

    A unit is rows that must stay together: chained by a shared content or a shared group.
    """
    units = np.unique(contents, return_inverse=True)[1]
    if groups is not None:
        units = _chained(units, groups)
    by_rank = np.lexsort((ranks[:, 1], ranks[:, 0]))
    first = np.full(len(units), len(units))
    np.minimum.at(first, units[by_rank], np.arange(len(units)))
    place = first[units]
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    return order, np.append(starts, len(order))


def _chained(units: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The units, those that share a group made one."""
    parent = list(range(int(units.max(initial=-1)) + 1))

    def top(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    first: dict[Any, int] = {}
    for unit, group in zip(_each(units), groups, strict=True):
        if group:
            parent[top(unit)] = top(first.setdefault(group, unit))
    return np.fromiter((top(unit) for unit in _each(units)), dtype=np.int64, count=len(units))


def _each(numbers: np.ndarray) -> Iterator[int]:
    return map(int, numbers)
