"""Which library multiplies float32 matrices on a CPU: MKL does, unless this processor is one it holds back on.

torch gives float32 products to MKL, which on AMD processors with AVX-512 uses half of their width; oneDNN, which torch
brings too, uses all of it (Zen 5: 220 against 100 GFLOP/s a core, docs/performance.md). torch hands products over to
oneDNN where it is told that bf16 would do; without AMX units oneDNN then computes in float32 all the same, and that
is asked here, product by product, before it is believed. By capability, never by timing: the same machine always
chooses the same. Attention kernels that call small products suffer from it, so those are told apart
(models/attention.py). Does not know Windows' and macOS' processors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tunewright.models.attention import attend_by_plain_products

SHAPES = ((8, 64, 8), (33, 1000, 17), (128, 256, 512), (512, 64, 128))  # m, k, n
FINE = (
    8 * torch.finfo(torch.float32).eps
)  # times k: numbers of mean square 1, summed in any order; bf16 is 100 times off


def choose_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Choose for this process; the reason where oneDNN multiplies float32 matrices, else ""."""
    if not _held_back(cpuinfo):
        return ""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    if not _is_float32():
        settings.fp32_precision = before
        return ""
    attend_by_plain_products()
    return "float32 products by oneDNN, since MKL uses half of this processor's vector units"


def _held_back(cpuinfo: Path) -> bool:
    """An AMD processor with AVX-512 and without AMX, in a torch that has both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cpu._is_amx_tile_supported():
        return False
    try:
        return "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        return False


def _is_float32() -> bool:
    """Whether products are those of float32, and not of fewer bits."""
    rng = torch.Generator().manual_seed(0)
    for m, k, n in SHAPES:
        a, b = torch.randn(m, k, generator=rng), torch.randn(k, n, generator=rng)
        for left, right in ((a, b), (a, b.T.contiguous().T), (a.T.contiguous().T, b)):
            error = (left @ right).double() - left.double() @ right.double()
            if not float(error.abs().max()) <= FINE * k:
                return False
    return True
