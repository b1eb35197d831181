"""The frozen trunk runs once: what reaches the lowest block that trains is kept, row by row, for all later passes.

And for later runs: a row's activation depends on nothing but the row, the trunk and the arithmetic, because rows go
through in groups of fixed shape, whatever else the data holds. It then has the same bytes whoever computed it, so that
it may be shared (feature_store.py), and a resumed run is the same run whether it finds it, or not. Whether the machine
keeps that promise is asked; where it does not, nothing is shared. From the uncached run it differs by rounding (1e-6):
there a row is padded to the longest of its step. Knows rows and groups; the model is trunk.py's matter.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Loaded, Precision, Task
from tunewright.data.batches import Steps
from tunewright.engine import memory
from tunewright.engine.distributed import is_first, to_device
from tunewright.engine.feature_store import FeatureStore
from tunewright.engine.row_groups import Groups, Lower, content_key, together
from tunewright.engine.trunk import NOTHING, Trunk
from tunewright.engine.unpadding import Unpadding
from tunewright.models.packed_weights import packed

ROOM = 2 << 30  # bytes of activations kept in memory; where they need more, the trunk runs every time
SEGMENT = 256 << 20  # bytes after which what was computed goes to the disk


class TrunkCache:
    """Activations below the boundary, and a way to put them in the place of the blocks that made them."""

    def __init__(self, task: Task, loaded: Loaded, steps: Steps, device: torch.device, precision: Precision) -> None:
        self._task, self._loaded, self._steps = task, loaded, steps
        self._device = device
        self._trunk = Trunk(task, loaded, device, precision)
        self._unpadding = Unpadding(task, self._trunk, loaded, steps)
        self._laid_out = 0  # of its products, how many had their weights laid out beforehand
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
        if training:
            with _still(model):
                self._unpadding.ask(model)
        if why := self._why_not(training):
            self._trunk.below = []
            return self._note(before, why if training else NOTHING)
        try:
            with _still(model):
                why = self._fill(model, training)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out(error):
                raise
            why = "memory does not reach for its activations"
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
        with packed(trunk.below) as self._laid_out:
            why = self._gather(model)
        if why:
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
        size = in_memory = 0
        for rows in itertools.chain(groups.of([*lower.given]), groups.of([i for i in missing if i not in lower.given])):
            values = groups.run(model, self._trunk, rows, lower=lower)
            made |= {names[i]: value for i, value in zip(rows, values, strict=True)}
            size += sum(_bytes(value) for value in values)
            if size > (SEGMENT if store else ROOM):
                in_memory += self._put_away(store, space, made)
                made, size = {}, 0
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
        found += f"; weights of {self._laid_out} products were laid out beforehand" if self._laid_out else ""
        shared = f"; not shared with other runs: {why}"
        if store:
            shared = "; later runs on this machine find it there, `tunewright cache clear` takes it away"
        self._loaded.notes += [
            f"The frozen trunk ran once: what {blocks} make of {len(self._keys)} rows is kept "
            f"({_size(self._kept) / 1e6:.3g} MB){found}{shared}.",
            *(store.said if store else ()),
        ]

    # -------------------------------------------------------------------- using
    @contextlib.contextmanager
    def under(self, batch: Batch) -> Iterator[None]:
        """Inside, the frozen blocks do nothing and the highest of them gives what was kept for these rows."""
        below = self._trunk.below
        kept = self._trunk.left_out(self._given(batch)) if below else contextlib.nullcontext()
        with kept, self._unpadding.over(below):
            yield

    def _given(self, batch: Batch) -> Tensor:
        return together([self._kept[self._keys[row]] for row in batch["row"]], batch)


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Inside, the model stands in eval mode and keeps nothing for slopes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _size(tensors: dict[bytes, Tensor]) -> int:
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _by_row(batch: Batch) -> bool:
    """Whether a batch holds each of its rows by itself."""
    rows = batch.get("row", [])
    return "position_ids" not in batch and len(rows) == memory.rows_of(batch) == len(set(rows))
