"""Rows in groups of fixed shape, so that what a trunk makes of a row depends on that row alone; and a row's name.

What a product of matrices rounds to may depend on the shape of all of them. A row of any data set and any number of
neighbours goes through in a group of the same shape, and comes out with the same bytes (docs/performance.md). Knows
examples by their tensors and length; neither models nor where activations are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Example, Loaded
from tunewright.data.batches import Steps
from tunewright.engine.trunk import Trunk, bytes_of
from tunewright.models.layout import max_positions
from tunewright.models.logprob import IGNORE

TOKENS = {"cpu": 256}  # of a group of rows of like length; more made MiniLM 4 % faster, and few rows fill it less
TOKENS_ELSEWHERE = 16384
PICTURES = 8  # rows of a group that have no length


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
            tensor = trunk.run(model, batch, together([lower.given[i] for i in filled], batch), lower.count)
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


def together(kept: list[Tensor], batch: Batch) -> Tensor:
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
