"""The number format of the forward pass, chosen by what the machine has and never by timing.

Timing would differ from run to run, and a resumed run must be the same run. What trains is float32 either way.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn

from tunewright.contracts import Precision

HALF = (torch.bfloat16, torch.float16)


def choose_precision(asked: str, device: torch.device, stored: Precision | None = None) -> tuple[Precision, str]:
    """(precision, reason). `stored` is what an interrupted run used."""
    if stored:
        return stored, "as when this run began"
    if asked != "auto":
        return ("bf16" if asked == "bf16" else "float32"), "the recipe says so"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes in bf16"
        return "float32", "the GPU has no bf16 units"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return "bf16", "the CPU has AMX matrix units"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bf16", "the CPU has AVX512-bf16"
    return "float32", "this device has no bf16 units"


def stored(model: nn.Module, chosen: Precision) -> Precision:
    """`chosen`, or bf16 where weights are stored in half precision (model.dtype).

    Beside what trains, which is float32, they can be multiplied under autocast alone.
    """
    return "bf16" if any(p.dtype in HALF for p in model.parameters()) else chosen


def compute_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bf16 with float32 sums, norms and losses, or everything in float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
