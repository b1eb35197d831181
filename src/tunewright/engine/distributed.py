"""Devices and processes: where tensors live, how many threads and ranks work. The only file that asks for a GPU.

One process pays nothing: every function on ranks returns at once. Under `torchrun` each rank takes its share of the
micro-batches of a step; counts are added up before the first backward and gradients after the last one, as sums,
because losses are already divided by the counts of the whole step. torch's DDP would divide by the number of ranks
instead, which is right only where every rank counts the same, and wants a bucket for every backward; one sum of one
flat buffer is exact and as little traffic.

Every rank must see the run folder and the data at the same paths; only the first one writes.
"""

from __future__ import annotations

import atexit
import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunewright.contracts import Batch
from tunewright.engine.products import choose_products
from tunewright.errors import Fault, TrainError, TunewrightError

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=12)  # a rank that is gone is noticed by its closed connection, not by waiting
FAREWELL = 10.0  # seconds in which the other ranks are told why one stops

_share = (0, 1)  # (rank, number of ranks); stays true when the connections are closed
_store: Any = None  # what ranks can still read then


# ------------------------------------------------------------------------- ranks
def join() -> None:
    """Meet the other processes that `torchrun` started; nothing where there is one. Raises TrainError if some lack.

    The first rank speaks: what the others would print on stdout goes nowhere.
    """
    global _share, _store
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if expected == 1 or _several():
        return
    found = next(iter(dist.rendezvous("env://")))
    _store = dist.PrefixStore("tunewright", found[0])
    backend = "cpu:gloo,cuda:nccl" if _has_gpu() else "gloo"
    if _has_gpu():
        torch.cuda.set_device(_local_rank())
    dist.init_process_group(backend, store=_store, rank=found[1], world_size=found[2], timeout=PATIENCE)
    _share = (dist.get_rank(), dist.get_world_size())
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    # accelerate and others fall back to independent processes without a word
    counted = len(gathered(rank()))
    if not expected == dist.get_world_size() == counted:
        got = f"{dist.get_world_size()} in the group, {counted} answered"
        raise TrainError(Fault("the processes did not all meet", "WORLD_SIZE", expected=str(expected), got=got))
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for the life of this process)


def _several() -> bool:
    return _share[1] > 1


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    return _share[0]


def size() -> int:
    """How many processes train together."""
    return _share[1]


def share() -> tuple[int, int]:
    """(rank, size): which of how many shares is this process's."""
    return _share


def is_first() -> bool:
    """Whether this process writes."""
    return rank() == 0


def gathered(value: T) -> list[T]:
    """The value of every rank, in order. Plain objects; every rank must call."""
    if not _several():
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, on every rank; nobody goes on before it is done."""
    if not _several():
        return make()
    box = [make() if is_first() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def largest(number: int) -> int:
    """The largest number of all ranks."""
    return max(gathered(number))


def total(counts: Mapping[str, float]) -> dict[str, float]:
    """Counts by name, added up over ranks; a name may be missing on some."""
    found: dict[str, float] = {}
    for one in gathered(dict(counts)):
        for name, count in one.items():
            found[name] = found.get(name, 0.0) + count
    return found


def sum_gradients(model: nn.Module) -> None:
    """Every gradient becomes the sum over ranks; one that no rank has stays absent."""
    if not _several():
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float32, device=device)  # gradients, then who has one
    places = flat[: sum(sizes)].split(sizes)
    for i, (parameter, place) in enumerate(zip(parameters, places, strict=True)):
        if parameter.grad is not None:
            place.copy_(parameter.grad.reshape(-1))
            flat[sum(sizes) + i] = 1.0
    dist.all_reduce(flat)
    present = flat[sum(sizes) :].tolist()
    for parameter, place, having in zip(parameters, places, present, strict=True):
        if having:
            parameter.grad = place.view_as(parameter).to(parameter.dtype)


def same_weights(model: nn.Module) -> None:
    """What trains becomes what it is on the first rank: drawn from one seed it already is, unless machines differ."""
    if _several():
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)


def split_rows(rows: Sequence[T], answer: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
    """`answer` of every item, each asked on one rank, in the order given: none twice, none invented to fill up."""
    if not _several():
        return answer(rows)
    parts = gathered(answer(rows[rank() :: size()]))
    found: list[Any] = [None] * len(rows)
    for i, part in enumerate(parts):
        found[i :: size()] = part
    return found


def farewell(error: BaseException) -> BaseException:
    """The error to raise on this rank: its own, or in plain words that of the rank that stopped first.

    The rank that fails closes its connections, which wakes the others out of their waiting, and stays until they know.
    """
    if not _several() or not dist.is_initialized():
        return error
    cut_off = not isinstance(error, TunewrightError) and "gloo" in str(error)
    first = not _store.check(["error"])
    if first:
        own = f"process {rank()} of {size()}: {error or type(error).__name__}"
        _store.set("error", "it is gone, without a word" if cut_off else own)
    dist.destroy_process_group()
    known = _store.add("known", 1)
    until = time.monotonic() + FAREWELL
    while first and known < size() and time.monotonic() < until:
        time.sleep(0.05)
        known = _store.add("known", 0)
    if not cut_off:
        return error
    said = _store.get("error").decode()
    return TrainError(Fault(f"another process of this run stopped: {said}", where="torchrun"))


# ----------------------------------------------------------------------- devices
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def choose_device() -> tuple[torch.device, str]:
    """The device and why. Every rank of a machine has a GPU of its own."""
    if _has_gpu():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _several() else 1
        if here > torch.cuda.device_count():
            got = f"{here} processes, {torch.cuda.device_count()} GPUs"
            raise TrainError(Fault("a GPU cannot be shared by processes", "torchrun --nproc_per_node", got=got))
        device = torch.device("cuda", _local_rank()) if _several() else torch.device("cuda")
        return device, torch.cuda.get_device_name(device)
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), "; ".join(filter(None, ("no GPU found", choose_products())))


def choose_threads(stored: int | None = None) -> tuple[int, str]:
    """How many threads compute. The number changes the order of sums, so a resumed run takes the stored one."""
    if stored:
        return stored, "as when this run began"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    why = "cores of this process"
    if (allowed := _allowance()) is not None and allowed < cores:
        cores, why = max(1, int(allowed)), f"this container may use {allowed:.3g} of {cores} cores"
    if _several():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
        return max(1, cores // here), f"{cores} cores shared by {here} processes"
    return cores, why


def _allowance(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the control group gives, by the tightest group above; None: no limit, or no groups.

    More threads than that are all stopped together when it is spent, while they wait for one another.
    """
    try:
        place = next(line for line in own.read_text().splitlines() if line.startswith("0::"))[3:]
    except (OSError, StopIteration):  # not Linux, or the first version of control groups
        place = ""
    folders = [root / part for path in [Path(place.lstrip("/"))] for part in (path, *path.parents)]
    found = [limit for folder in folders if (limit := _quota(folder)) is not None]
    return min(found, default=None)


def _quota(folder: Path) -> float | None:
    """Of one group: `cpu.max` ("quota period"), or the two files of the first version."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()[:2]
        except (OSError, ValueError):
            continue
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    return None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors moved, the rest as it is."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: the GPU's allocations, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
