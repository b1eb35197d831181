"""Float32 matrix products by oneDNN where torch's own library leaves half of the processor idle.

torch multiplies float32 matrices with MKL, which uses the 512-bit units of Intel's processors alone: on an AMD Zen 5
core it reached 100 GFLOP/s, and oneDNN, which torch carries as well, 210 to 240 (2026-11, `docs/performance.md`).
The kernels behind `mm` and `addmm` are exchanged in this process, below autograd, so that no model, method or task is
touched. Same precision: float32 throughout, sums in another order. Knows torch only, and the name of the maker.
"""

from __future__ import annotations

import functools
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST = 1 << 21  # multiplications of a product; smaller ones cost more by the call than they save
TOLERANCE = 1e-5  # of the self-test, relative to the largest entry; bf16 inside would give 1e-3
_libraries: list[torch.library.Library] = []  # kernels stand as long as their library lives


@functools.cache
def use_onednn() -> str:
    """Exchange the kernels where that pays; a sentence on what was chosen, and why. The same all through a process."""
    if why := _why_not():
        return f"Float32 matrix products on the CPU by torch's default: {why}."
    kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm")}

    def mm(keys: Any, one: Tensor, two: Tensor) -> Tensor:
        if suits(one, two):
            return by_onednn(one, two, None)
        return kernels["mm"].call_boxed(keys, one, two)  # type: ignore[no-any-return]

    def addmm(keys: Any, bias: Tensor, one: Tensor, two: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if beta == alpha == 1 and bias.shape == two.shape[1:] and bias.dtype is torch.float32 and suits(one, two):
            return by_onednn(one, two, bias)
        return kernels["addmm"].call_boxed(keys, bias, one, two, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that kernels were overridden: they were meant to be
        for name, function in (("mm", mm), ("addmm", addmm)):
            library.impl(name, function, "CPU", with_keyset=True, allow_override=True)
    _libraries.append(library)
    return "Float32 matrix products on the CPU by oneDNN: MKL leaves the 512-bit units of this AMD processor idle."


def suits(one: Tensor, two: Tensor) -> bool:
    """Whether a product (M, K) x (K, N) is of the kind and size that gains."""
    if one.dtype is not torch.float32 or two.dtype is not torch.float32:
        return False
    return one.shape[0] * one.shape[1] * two.shape[1] >= LEAST and not one.is_conj() and not one.is_neg()


def by_onednn(one: Tensor, two: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) x (K, N) + (N,) in float32."""
    weight = two.t()
    if not (weight.is_contiguous() or two.is_contiguous()):
        weight = weight.contiguous()  # a slice, or one number spread over many places
    found: Tensor = torch.ops.mkldnn._linear_pointwise(one.contiguous(), weight, bias, "none", [], "")
    return found


def _why_not() -> str:
    if not hasattr(torch.library, "get_kernel"):
        return "this torch lets no kernel be exchanged"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch carries no oneDNN"
    if not torch.backends.mkl.is_available():
        return "it is not MKL"
    if _maker() != "AuthenticAMD":
        return "this is no AMD processor, which MKL would use by half"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "this processor has no 512-bit units"
    return "" if _is_exact() else "oneDNN gave other numbers in a self-test"


def _maker(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's maker in its own words; "" where the system does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _is_exact() -> bool:
    """Someone may have allowed bf16 inside float32 products: then this would be another precision."""
    rng = torch.Generator().manual_seed(0)
    one, two = torch.randn(96, 160, generator=rng), torch.randn(160, 144, generator=rng)
    try:
        apart = by_onednn(one, two, None).double() - one.double() @ two.double()
    except RuntimeError:
        return False
    return bool(apart.abs().max() <= TOLERANCE * (one.double() @ two.double()).abs().max())
