"""Rows behind one Sequence: few of them in memory, many of them in a file of our own, read one by one when asked for.

Knows neither what a row is nor where it came from: a value is what JSON knows, and comes back as it went.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tunewright.data.spool import Spool

MOST_ROWS = 10_000  # kept in memory
MOST_BYTES = 16 << 20  # kept in memory, by a row in a hundred


class Store:
    """Values in the order in which they came; each is found by its place."""

    def __init__(self, pack: Callable[[Any], Any] | None = None, unpack: Callable[[Any], Any] | None = None) -> None:
        """pack, unpack: a value to what JSON knows, and back."""
        self._pack, self._unpack = pack, unpack
        self.why = ""  # why they are in memory although they are many
        self._values: list[Any] = []
        self._spool: Spool | None = None
        self._sampled = 0

    @property
    def in_file(self) -> bool:
        return self._spool is not None

    def __len__(self) -> int:
        return len(self._values if self._spool is None else self._spool)

    def __getitem__(self, place: int) -> Any:
        return self._values[place] if self._spool is None else self._read(self._spool, place)

    def append(self, value: Any) -> None:
        if self._spool is not None:
            self._put(self._spool, value)
            return
        self._values.append(value)
        if self.why:
            return
        if len(self._values) % 100 == 1:
            self._sampled += 100 * len(self._bytes(value))
        if len(self._values) > MOST_ROWS or self._sampled > MOST_BYTES:
            self._move()

    def _move(self) -> None:
        """From memory to a file."""
        try:
            self._spool = Spool()
        except OSError as error:
            self.why = f"no file can be made for them ({error.strerror})"
            return
        values, self._values = self._values, []
        for value in values:
            self.append(value)

    def _put(self, spool: Spool, value: Any) -> None:
        try:
            spool.append(self._bytes(value))
        except OSError as error:
            self.why = f"the file for them cannot be written ({error.strerror})"
            self._values, self._spool = [self._read(spool, place) for place in range(len(spool))], None

    def _read(self, spool: Spool, place: int) -> Any:
        value = json.loads(spool[place].decode("utf-8", "surrogatepass"))
        return self._unpack(value) if self._unpack else value

    def _bytes(self, value: Any) -> bytes:
        packed = self._pack(value) if self._pack else value
        return json.dumps(packed, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


class Rows(Sequence[Any]):
    """Some places of a store, in an order of their own; a slice is a list. Grows only while it is the whole store."""

    def __init__(self, values: Iterable[Any] = (), *, store: Store | None = None, places: Any = None) -> None:
        self.store = Store() if store is None else store
        self.places = None if places is None else np.asarray(places, dtype=np.int64)  # None: all of them
        for value in values:
            self.store.append(value)

    def __len__(self) -> int:
        return len(self.store) if self.places is None else len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        return self.store[index if self.places is None else int(self.places[index])]

    def __iter__(self) -> Iterator[Any]:
        store = self.store
        return (store[place] for place in (range(len(store)) if self.places is None else map(int, self.places)))

    def append(self, value: Any) -> None:
        if self.places is not None:
            raise ValueError("only all rows of a store can grow")
        self.store.append(value)


# ------------------------------------------------------------ whatever kind they are
def chosen(rows: Sequence[Any], places: Any) -> Sequence[Any]:
    """The rows at these places (ascending or not), lying where `rows` lie."""
    if isinstance(rows, Rows):
        return Rows(store=rows.store, places=np.asarray(places) if rows.places is None else rows.places[places])
    return [rows[int(place)] for place in places]


def plain(rows: Sequence[Any]) -> Sequence[Any]:
    """A list, unless the rows are in a file."""
    return rows if isinstance(rows, Rows) and rows.store.in_file else list(rows)


def joined(rows: Sequence[Any], more: Sequence[Any]) -> Sequence[Any]:
    """The one behind the other, lying where `rows` lie."""
    if not isinstance(rows, Rows):
        return [*rows, *more]
    places = np.arange(len(rows)) if rows.places is None else rows.places
    first = len(rows.store)
    for row in more:
        rows.store.append(row)
    return Rows(store=rows.store, places=np.concatenate([places, np.arange(first, len(rows.store))]))
