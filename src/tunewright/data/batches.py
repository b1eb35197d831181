"""Examples, and the batches of each optimiser step as a pure function of (seed, epoch, step).

Knows nothing of tasks: takes their `encode`, `augment` and `collate`. A resumed run asks for step 137 and gets it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunewright.contracts import Batch, Example, Record
from tunewright.data.packed_examples import packed, unpacked
from tunewright.data.spool import Spool

WINDOW = 50  # steps within which rows of like length come together, at most a quarter of a pass (as in transformers)
MEMORY = 2 << 30  # bytes of encoded examples kept in memory; beyond that they are encoded again when needed
OVERHEAD = 1000  # bytes that an example costs beside its numbers (measured: 1.1 kB for 15 tokens)
MANY = 10_000  # from here on small examples are kept in a file


class Examples(Sequence[Example]):
    """Encoded records, made when first asked for and kept: many small ones in a file, others while memory reaches."""

    def __init__(self, records: Sequence[Record], encode: Callable[[Record], Example], memory: int = MEMORY) -> None:
        self.records = records
        self.why = ""  # why they are in memory, though there are many
        self._encode = encode
        self._kept: dict[int, Example] = {}
        self._room = memory
        self._spool: Spool | None = None
        if len(records) > MANY:
            self._places = np.full(len(records), -1)  # where in the spool
            try:
                self._spool = Spool()
            except OSError as error:
                self.why = f"no file can be made for them ({error.strerror})"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if index in self._kept:
            return self._kept[index]
        if self._spool is not None and self._places[index] >= 0:
            return unpacked(self._spool[self._places[index]])
        example = self._encode(self.records[index])
        if self._spool is not None and (held := packed(example)) and self._is_put(index, held):
            return example
        size = OVERHEAD + sum(v.numel() * v.element_size() for v in example.values() if isinstance(v, Tensor))
        if size <= self._room:
            self._kept[index] = example
            self._room -= size
        return example

    def _is_put(self, index: int, held: bytes) -> bool:
        """Written to the file; where it takes no more, memory keeps them from now on."""
        assert self._spool is not None
        try:
            self._places[index] = len(self._spool)
            self._spool.append(held)
        except OSError as error:
            self.why = f"the file for them cannot be written ({error.strerror})"
            self._spool = None
        return self._spool is not None


class Steps(Sequence[list[Batch]]):
    """`steps[i]`: this process's micro-batches of optimiser step i. The same whatever came before it."""

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Callable[[Sequence[Example]], Batch],
        augment: Callable[[Example, torch.Generator], Example],
        *,
        seed: int,
        batch_size: int,
        accumulation: int,
        epochs: float,
        max_steps: int | None,
        share: tuple[int, int] = (0, 1),
        lengths: Sequence[int] | np.ndarray | None = None,
        tokens: Sequence[int] | np.ndarray | None = None,
        most: int | None = None,
    ) -> None:
        """share: (rank, size): of every step only each size-th micro-batch is made here, which may be none.

        lengths: of every example, where rows of like length shall share a step, so that less is padded.
        tokens: of every example, where a step may be cut so that no micro-batch holds more than `most` of them; a row
        that is longer by itself stays whole.
        """
        self.examples, self._collate, self._augment = examples, collate, augment
        self._seed, self.batch_size, self._rows = seed, batch_size, batch_size * accumulation * share[1]
        self._share = share
        self.per_epoch = math.ceil(len(examples) / self._rows)
        self._total = max_steps or max(1, round(epochs * self.per_epoch))
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._tokens = None if tokens is None else np.asarray(tokens)
        self.most = None if self._tokens is None else most
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self._total

    def epoch(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return step / self.per_epoch

    def __getitem__(self, step: Any) -> Any:
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        chosen = self._order[1][place * self._rows : (place + 1) * self._rows]
        rank, size = self._share
        return [self._collate([self._drawn(epoch, int(i)) for i in rows]) for rows in self._cut(chosen)[rank::size]]

    def _cut(self, chosen: np.ndarray) -> list[np.ndarray]:
        """A step's rows as micro-batches of at most `batch_size` rows; where tokens are known, of like size too."""
        if self._tokens is None or self.most is None:
            return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
        rows = chosen[np.argsort(-self._tokens[chosen], kind="stable")]
        alike, sizes = self._lengths is not None, self._tokens[rows].tolist()
        cut = _of_like_length if alike else _evenly
        return [rows[np.asarray(places)] for places in cut(sizes, self.batch_size, self.most)]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """All rows in the order of this pass. By length: windows of shuffled rows are sorted, then steps are shuffled.

        Which rows share a step depends on their number in a step alone, not on how the step is cut.
        """
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self.examples))
        if self._lengths is None:
            return order
        size = self._rows * max(1, min(WINDOW, self.per_epoch // 4))
        windows = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in windows])
        whole = len(order) // self._rows * self._rows  # a last, smaller step stays the last
        steps = order[:whole].reshape(-1, self._rows)
        return np.concatenate([rng.permutation(steps).reshape(-1), order[whole:]])

    def _drawn(self, epoch: int, index: int) -> Example:
        example = self.examples[index]
        return self._augment(example, self._generator(epoch, example["row"]))

    def _generator(self, epoch: int, row: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, epoch, row))

    def once_over(self) -> Iterator[Batch]:
        """Every row once, in the order of the data, without augmentation."""
        for start in range(0, len(self.examples), self.batch_size):
            yield self.together(range(start, min(start + self.batch_size, len(self.examples))))

    def together(self, rows: Iterable[int]) -> Batch:
        """These rows as one batch, without augmentation."""
        return self._collate([self.examples[i] for i in rows])


def _of_like_length(sizes: Sequence[int], rows: int, most: int) -> list[list[int]]:
    """Places of rows that will be padded, in order of size, the longest first: neighbours, while they fit."""
    found: list[list[int]] = []
    for i in range(len(sizes)):
        if not found or len(found[-1]) == rows or sizes[found[-1][0]] * (len(found[-1]) + 1) > most:
            found.append([])
        found[-1].append(i)
    return found


def _evenly(sizes: Sequence[int], rows: int, most: int) -> list[list[int]]:
    """Places of rows that will be packed, the longest first, each to where least is: as few parts as suffice."""
    parts = max(math.ceil(len(sizes) / rows), min(len(sizes), math.ceil(sum(sizes) / most)))
    while True:
        found: list[list[int]] = [[] for _ in range(parts)]
        filled = [0] * parts
        for i, size in enumerate(sizes):
            place = min((b for b in range(parts) if len(found[b]) < rows), key=lambda b: filled[b])
            found[place].append(i)
            filled[place] += size
        if max(filled) <= max(most, sizes[0]) or parts == len(sizes):
            return found
        parts += 1


def derive_seed(*parts: object) -> int:
    """A seed that depends on all parts, the same on every machine (Python's own hash is not)."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def sample(batches: Iterable[Batch], count: int) -> list[Batch]:
    """So many batches, each as likely as any other: the first ones of a sorted file would show one class only."""
    rng = random.Random(0)  # noqa: S311
    kept: list[Batch] = []
    for i, batch in enumerate(batches):
        if i < count:
            kept.append(batch)
        elif (place := rng.randrange(i + 1)) < count:  # reservoir sampling: how many there are is not known before
            kept[place] = batch
    return kept
