"""The number format of the forward pass, chosen by what the machine has and never by timing.

Timing would differ from run to run, and a resumed run must be the same run. What trains is float32 either way.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn

from tunewright.contracts import Precision
from tunewright.errors import Fault, RecipeError
from tunewright.models.surgery import stores_half


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


def suit_storage(asked: str, chosen: Precision, model: nn.Module) -> tuple[Precision, str]:
    """(precision, reason) for a model as it is stored; the reason is "" where `chosen` stands.

    Raises RecipeError where frozen weights are in half precision and the recipe asks for float32.
    """
    if chosen == "bf16" or not stores_half(model):
        return chosen, ""
    if asked == "float32":
        problem = "frozen weights are stored in half precision, so their products cannot be computed in float32"
        remedy = "Leave train.precision out, or give model.dtype=float32."
        raise RecipeError(Fault(problem, where="train.precision", expected="auto or bf16", got=asked, remedy=remedy))
    return "bf16", "frozen weights are stored in half precision"


def compute_as_stored(model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Float32, but for a model with weights in half precision."""
    return compute_in(precision_as_stored(model), device)


def precision_as_stored(model: nn.Module) -> Precision:
    return "bf16" if stores_half(model) else "float32"


def compute_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bf16 with float32 sums, norms and losses, or everything in float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
