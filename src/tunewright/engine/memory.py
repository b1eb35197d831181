"""Out of memory: micro-batches are cut in halves and the same step is begun anew, with the same update.

Exact because losses are sums and their counts are those of the whole step. Knows batches as tensors and lists; not
what they mean.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunewright.contracts import Batch, State, Task
from tunewright.engine.packing import cut_documents, documents_of
from tunewright.errors import Fault, TrainError

LESS = (
    "Shorter inputs, train.gradient_checkpointing=true, on a GPU train.activation_offload=true, method=lora or a "
    "smaller model need less."
)
# glibc's mallopt: how many blocks may be maps of their own, what stays at the end of the heap, by how much it grows
KEEPING = {-4: 0, -1: 1 << 30, -2: 16 << 20}
WORDS = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def is_out(error: BaseException) -> bool:
    """Whether memory was wanting; torch says so in different words on each device."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(word.lower() in str(error).lower() for word in WORDS)


def first_line(error: BaseException) -> str:
    """What the machine said, without the pages that CUDA adds."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def keep_pages() -> str:
    """Let freed memory stay with the process, up to 1 GB, for the next step; a sentence on it, "" where it cannot be.

    As glibc comes, every large block is a map of its own: given back when freed, and made of zeroed pages when asked
    for again. 47 MB of zeros took 33 ms that way and 3 ms this way (one core of a virtual machine, 2026-11).
    """
    libc = _libc()
    if libc is None or not all([libc.mallopt(which, value) for which, value in KEEPING.items()]):
        return ""
    return "Freed memory stays with the process for the next step (glibc)."


def _libc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    except OSError:
        return None
    return libc if libc and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def give_back() -> None:
    """What is cached but not used goes back to the device, or to the machine."""
    if libc := _libc():
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_of(batch: Batch) -> int:
    """B: how many rows the tensors of a batch have; of one packed row, how many documents."""
    if _is_one_row(batch):
        return documents_of(batch)
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _is_one_row(batch: Batch) -> bool:
    return "position_ids" in batch and len(batch["position_ids"]) == 1


def cut(batch: Batch, pieces: int) -> list[Batch]:
    """The batch in so many parts of whole rows, as even as possible; never more parts than rows.

    A list that has not one entry a row (the row ids of packed sequences) goes with every part.
    """
    rows = rows_of(batch)
    if pieces > 1 and _is_one_row(batch):
        return cut_documents(batch, pieces)
    ends = [round(rows * i / min(pieces, rows)) for i in range(min(pieces, rows) + 1)]
    if len(ends) <= 2:
        return [batch]
    return [
        {
            key: value[start:stop] if isinstance(value, (Tensor, list)) and len(value) == rows else value
            for key, value in batch.items()
        }
        for start, stop in itertools.pairwise(ends)
    ]


def halve(
    state: State, task: Task, micro_batches: Sequence[Batch], error: BaseException, say: Callable[[str], None]
) -> None:
    """Twice as many pieces from now on; said, and kept in checkpoints, so that a resumed run is the same run.

    Raises TrainError where single rows do not fit, or where the rows of a batch belong together.
    """
    rows = max(rows_of(batch) for batch in micro_batches)
    if state.pieces >= rows or task.couples_rows:
        wanting = "a single row" if rows == 1 or not task.couples_rows else f"{rows} rows, which this task cannot part"
        remedy = "Lower train.per_device_train_batch_size. " if rows > 1 and task.couples_rows else ""
        raise TrainError(
            Fault(
                f"memory does not reach for {wanting}", f"step {state.step + 1}", got=first_line(error),
                remedy=f"{remedy}{LESS}",
            )
        ) from error  # fmt: skip
    state.pieces *= 2
    say(
        f"Out of memory in step {state.step + 1}: micro-batches of {rows} rows are cut into {state.pieces} pieces from "
        "now on. The update of each step stays the same; it takes a little longer."
    )
