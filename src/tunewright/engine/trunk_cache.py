"""The frozen trunk runs once: what reaches the lowest block that trains is kept, row by row, for all later passes.

And for later runs: a row's activation depends on nothing but the row, the trunk and the arithmetic, because rows go
through in groups of fixed shape, whatever else the data holds. It then has the same bytes whoever computed it, so that
it may be shared (feature_store.py), and a resumed run is the same run whether it finds it, or not. Whether the machine
keeps that promise is asked; where it does not, nothing is shared. From the uncached run it differs by rounding (1e-6):
there a row is padded to the longest of its step. Knows rows and groups; the model is trunk.py's matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Example, Loaded, Precision, Task
from tunewright.data.batches import Steps
from tunewright.engine import memory
from tunewright.engine.distributed import is_first, to_device
from tunewright.engine.feature_store import FeatureStore
from tunewright.engine.trunk import NOTHING, Trunk, bytes_of
from tunewright.models.layout import max_positions
from tunewright.models.logprob import IGNORE

ROOM = 2 << 30  # bytes of activations kept in memory; where they need more, the trunk runs every time
SEGMENT = 256 << 20  # bytes after which what was computed goes to the disk
TOKENS = {"cpu": 256}  # of a group of rows of like length; its shape is part of what a row's digits depend on
TOKENS_ELSEWHERE = 16384
PICTURES = 8  # rows of a group that have no length


class TrunkCache:
    """Activations below the boundary, and a way to put them in the place of the blocks that made them."""

    def __init__(self, task: Task, loaded: Loaded, steps: Steps, device: torch.device, precision: Precision) -> None:
        self._task, self._loaded, self._steps = task, loaded, steps
        self._device = device
        self._trunk = Trunk(task, loaded, device, precision)
        self._kept: dict[bytes, Tensor] = {}
        self._keys: dict[str, bytes] = {}  # by row

    @contextlib.contextmanager
    def once_over(self, model: nn.Module) -> Iterator[Iterator[Batch]]:
        """Every row once, in the order of the data; while a batch is looked at, the trunk's work is done already."""

        def batches() -> Generator[Batch, None, None]:
            with torch.inference_mode(False):
                self.follow(model, training=False)
            for batch in self._steps.once_over():
                with self.under(batch):
                    yield to_device(batch, self._device)

        given = batches()
        try:
            yield given
        finally:
            given.close()

    def follow(self, model: nn.Module, training: bool = True) -> None:
        """Look where the boundary is now, and fill the cache for it; `loaded.notes` says what came of it, and why.

        training: many passes, in which what trains has its dropout; else one, in eval mode.
        """
        before = bool(self._trunk.below)
        self._kept = {}
        if why := self._why_not(training):
            self._trunk.below = []
            return self._note(before, why if training else NOTHING)
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                why = self._fill(model, training)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out(error):
                raise
            why = "memory does not reach for its activations"
        finally:
            for module, mode in modes:
                module.training = mode
        if why:
            self._trunk.below, self._kept = [], {}
            self._note(before, why if training else NOTHING)
        return None

    def _note(self, before: bool, why: str) -> None:
        if before or why != NOTHING:
            self._loaded.notes.append(f"The frozen trunk runs in every step: {why}.")

    def _why_not(self, training: bool) -> str:
        """What rules it out before the model is asked."""
        if training and len(self._steps) <= self._steps.per_epoch:
            return NOTHING  # every row is seen once
        blocks = self._loaded.layout.blocks if self._loaded.layout else ()
        if not blocks or any(p.requires_grad for p in self._loaded.model.get_submodule(blocks[0]).parameters()):
            return NOTHING
        if self._task.augments and training:
            return "rows are augmented, so that no two passes see the same input"
        if type(self._task).prepare is not Task.prepare:
            return "this task makes its inputs while it trains"
        return ""

    # ------------------------------------------------------------------ filling
    def _fill(self, model: nn.Module, training: bool) -> str:
        """Keep what comes out below the boundary for every row; a reason where that cannot be."""
        examples, trunk = self._steps.examples, self._trunk
        self._keys = self._keys or {example["row"]: content_key(example) for example in examples}
        if len(self._keys) != len(examples):
            return "row ids repeat"
        few = self._steps.together(range(min(2, len(examples))))
        if not _by_row(few):
            return "rows are packed, so that one activation holds several"
        if why := trunk.find(model, few):
            return why
        if training and trunk.is_noisy(model, few):
            return "dropout below what trains is drawn anew in every step"
        if trunk.run(model, few) is None:
            return "its blocks hand on more than one tensor"
        if why := self._gather(model):
            return why
        return trunk.bears(model, few, self._given(few))

    def _gather(self, model: nn.Module) -> str:
        """From the store, or computed and put there; a reason where there is no room."""
        store, why = FeatureStore.open()
        groups = Groups(self._steps, self._loaded)
        names = list(self._keys.values())
        wanted = {key: i for i, key in enumerate(names)}
        space = self._trunk.fingerprint() if store else ""
        self._kept = store.read(space, wanted.keys()) if store else {}
        if store and len(self._kept) < len(wanted) and not groups.are_pure(model, self._trunk):
            store, why, self._kept = None, "this machine gives a row other digits beside other rows", {}
        there = len(self._kept)
        missing = {i: key for key, i in wanted.items() if key not in self._kept}
        lower = self._lower(store, missing) if store else Lower()
        made: dict[bytes, Tensor] = {}
        in_memory = 0
        for rows in itertools.chain(groups.of([*lower.given]), groups.of([i for i in missing if i not in lower.given])):
            values = groups.run(model, self._trunk, rows, lower=lower)
            made |= {names[i]: value for i, value in zip(rows, values, strict=True)}
            if _size(made) > (SEGMENT if store else ROOM):
                in_memory += self._put_away(store, space, made)
                made = {}
            if in_memory > ROOM:
                return f"its activations need more than {ROOM >> 30} GB of memory"
        self._put_away(store, space, made)
        self._tell(there, len(lower.given), store, why)
        return ""

    def _lower(self, store: FeatureStore, rows: dict[int, bytes]) -> Lower:
        """What an earlier run kept of these rows further down: the trunk is run from there."""
        for count in range(len(self._trunk.below) - 1, 0, -1) if rows else ():
            found = store.read(self._trunk.fingerprint(count), set(rows.values()))
            if found:
                return Lower(count, {i: found[key] for i, key in rows.items() if key in found})
        return Lower()

    def _put_away(self, store: FeatureStore | None, space: str, made: dict[bytes, Tensor]) -> int:
        """Into the store, if this process writes and there is one; the number of bytes that stay in memory."""
        writes = store is not None and made and is_first()
        found = store.write(space, made, self._trunk.about()) if store and writes else made
        self._kept |= found
        return sum(_bytes(value) for key, value in found.items() if value is made[key])

    def _tell(self, there: int, lower: int, store: FeatureStore | None, why: str) -> None:
        blocks = f"{len(self._trunk.below)} of {len(self._loaded.layout.blocks)} blocks"
        found = f"; {there} of them were there from earlier runs" if there else ""
        found += f"; {lower} went on from what earlier runs kept further down" if lower else ""
        shared = "" if store else f"; not shared with other runs: {why}"
        self._loaded.notes += [
            f"The frozen trunk ran once: what {blocks} make of {len(self._keys)} rows is kept "
            f"({_size(self._kept) / 1e6:.3g} MB){found}{shared}.",
            *(store.said if store else ()),
        ]

    # -------------------------------------------------------------------- using
    @contextlib.contextmanager
    def under(self, batch: Batch) -> Iterator[None]:
        """Inside, the frozen blocks do nothing and the highest of them gives what was kept for these rows."""
        if not self._trunk.below:
            yield
            return
        with self._trunk.left_out(self._given(batch)):
            yield

    def _given(self, batch: Batch) -> Tensor:
        return _together([self._kept[self._keys[row]] for row in batch["row"]], batch)


@dataclass(frozen=True)
class Lower:
    """What the first `count` blocks make of some rows, by their place in the data."""

    count: int = 0
    given: Mapping[int, Tensor] = field(default_factory=dict)


class Groups:
    """Rows in groups whose shape depends on the single row: filled up to a fixed number, padded to a fixed length.

    A padded row shall always be one: some models take another path where nothing in a batch is padded.
    """

    def __init__(self, steps: Steps, loaded: Loaded) -> None:
        self._steps = steps
        self._longest = max_positions(loaded.model)
        self._tokens = TOKENS.get(next(loaded.model.parameters()).device.type, TOKENS_ELSEWHERE)

    def of(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows, each group of one shape and no larger than it may be."""
        shapes: dict[tuple[int, int, int], list[int]] = {}
        for i in rows:
            shapes.setdefault(self._shape(self._steps.examples[i]), []).append(i)
        return [
            members[start : start + count]
            for (count, *_), members in sorted(shapes.items())
            for start in range(0, len(members), count)
        ]

    def _shape(self, example: Example) -> tuple[int, int, int]:
        """(rows, length padded to, length where it is full) of the group that this row goes through in."""
        if "length" not in example:
            return PICTURES, 0, 0
        length = example["length"]
        unit = max(4, 1 << max(0, length.bit_length() - 4))  # at most an eighth is padding
        width = (length // unit + 1) * unit
        if self._longest and width > self._longest:
            width = max(self._longest, length)
        return max(2, self._tokens // width), width, length if length == width else 0

    def run(
        self, model: nn.Module, trunk: Trunk, rows: Sequence[int], *, shift: int = 0, lower: Lower | None = None
    ) -> list[Tensor]:
        """What the trunk makes of each. shift: how many places later the rows stand in their group.

        lower: where it holds the first row of a group, it holds them all.
        """
        count, width, _ = self._shape(self._steps.examples[rows[0]])
        filled = [rows[-1]] * shift + [*rows, *[rows[-1]] * (count - len(rows) - shift)]
        batch = padded(self._steps.together(filled), width)
        if lower is not None and rows[0] in lower.given:
            tensor = trunk.run(model, batch, _together([lower.given[i] for i in filled], batch), lower.count)
        else:
            tensor = trunk.run(model, batch)
        assert tensor is not None, "asked before"
        return [one.to("cpu", copy=True) for one in _rows(tensor, batch)[shift : shift + len(rows)]]

    def are_pure(self, model: nn.Module, trunk: Trunk) -> bool:
        """Whether a row has the same digits in another place of its group and beside other rows."""
        group = max(self.of(range(min(64, len(self._steps.examples)))), key=len)
        together = self.run(model, trunk, group)
        alone = self.run(model, trunk, group[:1], shift=1)
        return torch.equal(together[0], alone[0])


def content_key(example: Example) -> bytes:
    """SHA-256 over what a model can be given of an example: its tensors. Plain values (row id, label) are the task's.

    Its length stands in the shapes.
    """
    digest = hashlib.sha256()
    for name, value in sorted(example.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(bytes_of(value))
    return digest.digest()


def padded(batch: Batch, width: int) -> Batch:
    """The batch with its rows padded to `width` tokens; as it is where no mask could hide the padding."""
    mask = batch.get("attention_mask")
    if mask is None or mask.shape[1] >= width:
        return batch
    length = mask.shape[1]

    def wider(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != length:
            return value
        room = value.new_full((len(value), width - length, *value.shape[2:]), IGNORE if name == "labels" else 0)
        return torch.cat([value, room], dim=1)

    return {name: wider(name, value) for name, value in batch.items()}


def _size(tensors: dict[bytes, Tensor]) -> int:
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _by_row(batch: Batch) -> bool:
    """Whether a batch holds each of its rows by itself."""
    rows = batch.get("row", [])
    return "position_ids" not in batch and len(rows) == memory.rows_of(batch) == len(set(rows))


def _together(kept: list[Tensor], batch: Batch) -> Tensor:
    """(B, ...) activations, with zeros where the batch is padded: the blocks above mask those places."""
    if "attention_mask" not in batch:
        return torch.stack(kept)
    given = kept[0].new_zeros(len(kept), batch["attention_mask"].shape[1], *kept[0].shape[1:])
    for row, one in zip(given, kept, strict=True):
        row[: len(one)] = one
    return given


def _rows(tensor: Tensor, batch: Batch) -> list[Tensor]:
    """One activation a row: real tokens alone where rows are padded at their end."""
    mask = batch.get("attention_mask")
    if mask is None:
        return list(tensor)
    return [one[: int(count)] for one, count in zip(tensor, mask.sum(-1), strict=True)]
