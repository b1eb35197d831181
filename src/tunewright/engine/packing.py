"""Sequences of a micro-batch laid end to end, so that no arithmetic is spent on padding. Knows ids and labels only.

Documents stay apart because positions begin anew: transformers tells them from that, if no attention mask and no
cache are given. Some families do not (their forward drops the positions), so the model itself is asked first.
Where a model attends document by document (models/attention.py) a micro-batch is one row; else rows are no longer
than the longest document, because attention costs with the square of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Example
from tunewright.models.attention import attend_by_document, attend_in_rows
from tunewright.models.logprob import IGNORE, causal_logprob

TOLERANCE = {torch.float32: 1e-5}  # per token, natural log
COARSE = 0.1  # half precision rounds differently in other shapes; a leak was 0.4 to 0.5 (docs/facts.md)
PROBE = (11, 7, 13)  # tokens of the documents of the self-test


def packed_collate(examples: Sequence[Example]) -> Batch:
    """Rows as long as the longest example, each filled with whole examples one after the other.

    Returns input_ids, labels and position_ids (B, T), B at most the number of examples, and `row`, every row id in
    order of place. Positions begin at 0 with every document, and its first label is -100: nothing stands before it.
    What is left of a row is one more document without labels.
    """
    return _laid(examples, _bins([len(e["input_ids"]) for e in examples]))


def one_row_collate(examples: Sequence[Example]) -> Batch:
    """As `packed_collate`, but a single row: nothing is left of it. For models that attend document by document."""
    return _laid(examples, [list(range(len(examples)))])


def _laid(examples: Sequence[Example], bins: Sequence[Sequence[int]]) -> Batch:
    """Whole examples one after the other, in rows as given."""
    longest = max(sum(len(examples[j]["input_ids"]) for j in chosen) for chosen in bins)
    ids = torch.zeros(len(bins), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    positions = torch.zeros_like(ids)
    for i, chosen in enumerate(bins):
        place = 0
        for example in (examples[j] for j in chosen):
            end = place + len(example["input_ids"])
            ids[i, place:end] = example["input_ids"]
            labels[i, place + 1 : end] = example["labels"][1:]
            positions[i, place:end] = torch.arange(end - place)
            place = end
        positions[i, place:] = torch.arange(longest - place)
    rows = [examples[j]["row"] for chosen in bins for j in chosen]
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "row": rows}


def _bins(sizes: Sequence[int]) -> list[list[int]]:
    """Which examples share a row: the longest first, each into the first row that has room. Rows are never longer than
    the longest example: attention costs with the square of a row, and position tables end."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((b for b, free in enumerate(room) if free >= sizes[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max(sizes))
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins


def documents_of(batch: Batch) -> int:
    """How many documents a packed batch of one row holds."""
    return int((batch["position_ids"] == 0).sum())


def cut_documents(batch: Batch, pieces: int) -> list[Batch]:
    """A packed batch of one row in so many parts of whole documents, at most one a document; `row` goes along."""
    starts = (batch["position_ids"][0] == 0).nonzero().squeeze(-1).tolist()
    parts = min(pieces, len(starts))
    chosen = [round(len(starts) * i / parts) for i in range(parts)]
    ends = [*(starts[i] for i in chosen), batch["position_ids"].shape[1]]
    return [
        {key: value[:, start:stop] if isinstance(value, Tensor) else value for key, value in batch.items()}
        | {"row": batch["row"][first:last]}
        for start, stop, first, last in zip(ends[:-1], ends[1:], chosen, [*chosen[1:], len(starts)], strict=True)
    ]


def how_to_pack(model: nn.Module) -> tuple[Callable[[Sequence[Example]], Batch] | None, str]:
    """The collate that packs for this very model, or None; and why. The model may attend another way afterwards."""
    if attend_by_document(model):
        able, why = can_pack(model)
        if able:
            return one_row_collate, f"{why}, every document attends by itself"
        attend_in_rows(model)
    able, why = can_pack(model)
    return (packed_collate if able else None), why


def can_pack(model: nn.Module) -> tuple[bool, str]:
    """Whether documents laid end to end stay apart in this very model, and why (not). A few forward passes."""
    model.eval()
    vocabulary = int(getattr(model.config, "vocab_size", 0) or model.get_input_embeddings().num_embeddings)  # type: ignore[union-attr,operator]
    rng = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (n,), generator=rng) for n in PROBE]
    others = [torch.randint(vocabulary, (n,), generator=rng) for n in PROBE]
    try:
        together = _each(model, documents)
        alone = [_each(model, [ids])[0] for ids in documents]
        neighbours = [_each(model, [*others[:i], ids])[-1] for i, ids in enumerate(documents)]
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:  # whatever a family's forward refuses
        return False, f"this model takes no packed rows ({str(error).splitlines()[0][:100]})"
    apart = max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))
    leak = max(float((a - b).abs().max()) for a, b in zip(together, neighbours, strict=True))
    fine = TOLERANCE.get(next(model.parameters()).dtype, COARSE)
    if not apart <= fine or not leak <= fine:
        return (
            False,
            f"documents leak into each other in this model (packed and alone differ by {max(apart, leak):.2g})",
        )
    return True, f"packed equals alone to {max(apart, leak):.1g} a token in this model"


def _each(model: nn.Module, documents: Sequence[Tensor]) -> list[Tensor]:
    """Log-probabilities of each document's tokens but the first, all documents in one row."""
    device = next(model.parameters()).device
    starts = [torch.arange(len(ids)) for ids in documents]
    ids = torch.cat(list(documents)).unsqueeze(0).to(device)
    labels = ids.clone()
    positions = torch.cat(starts).unsqueeze(0).to(device)
    labels[positions == 0] = IGNORE
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": positions}
    with torch.no_grad():
        found = causal_logprob(model, batch)[0].cpu()
    ends = torch.tensor([len(ids) for ids in documents]).cumsum(0).tolist()
    return [found[end - len(ids) : end - 1] for ids, end in zip(documents, ends, strict=True)]
