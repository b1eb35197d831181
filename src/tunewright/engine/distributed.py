"""Devices and processes: where tensors live, how many threads work. The only file that asks for a GPU.

One process pays nothing. Several are refused in a clear sentence until they are built.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tunewright.contracts import Batch
from tunewright.errors import Fault, TrainError


def choose_device() -> tuple[torch.device, str]:
    """The device and why."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainError(Fault("several processes are not built yet", where="WORLD_SIZE", remedy="Start one process."))
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), "no GPU found"


def choose_threads(stored: int | None = None) -> tuple[int, str]:
    """How many threads compute. The number changes the order of sums, so a resumed run takes the stored one."""
    if stored:
        return stored, "as when this run began"
    return len(os.sched_getaffinity(0)) if hasattr(
        os, "sched_getaffinity"
    ) else os.cpu_count() or 1, "cores of this process"


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
