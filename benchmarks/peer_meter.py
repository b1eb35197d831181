"""What one run of one side took: CPU time of its training phase, peak memory, losses. The same meter for every side.

Wall time is written down, but on a shared machine it means nothing with one thread. Knows no trainer.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "tunewright", "llamafactory")


class Meter:
    """`with meter.preparing(): ...` and `with meter.training(): ...`; what was measured is in `found`."""

    def __init__(self, threads: int | None) -> None:
        """threads: None leaves their number to whoever trains."""
        self.threads = threads
        self.found: dict[str, Any] = {"cpu_s": 0.0, "wall_s": 0.0, "prepare_cpu_s": 0.0}
        self._set()

    def _set(self) -> None:
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        self.found["threads"] = torch.get_num_threads()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """From the loaded model to the first step: not counted, but written down."""
        began = time.process_time()
        yield
        self.found["prepare_cpu_s"] += time.process_time() - began

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """May be entered several times: the sum counts."""
        self._set()
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.found["cpu_s"] += time.process_time() - cpu
        self.found["wall_s"] += time.perf_counter() - wall
        self.found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux

    def hand_over(self, **more: Any) -> None:
        """The last line of the process, read by the one that started it."""
        print(json.dumps(self.found | more | {"versions": versions(), "cpu": processor()}), flush=True)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def processor() -> str:
    """Its name, and which of the units that matter here it has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    first = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    lines = {key.strip(): value.strip() for key, _, value in first}
    name = f"{lines.get('model name', platform.processor())}, family {lines.get('cpu family', 'unknown')}"
    units = [u for u in ("avx512f", "avx512_bf16", "amx_bf16") if u in lines.get("flags", "").split()]
    return f"{name} ({', '.join(units) or 'no AVX512'})"
