"""AdamW whose moments take a byte each (Dettmers et al. 2022, arXiv 2110.02861), through bitsandbytes.

Moments of parameters of 4,096 numbers or more are stored in blocks of 8 bits with a scale each; smaller ones, and the
weights themselves, stay float32. Runs on a CPU too. Knows no model.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

EXTRA = "pip install 'tunewright[quant]'"


def missing() -> str:
    """Why it cannot be had here; "" where it can."""
    return "" if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser, with the same constants as ours in float32."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def as_it_counts(optimizer: torch.optim.Optimizer, value: Tensor) -> Tensor | int:
    """The number of steps as this optimiser keeps it: bitsandbytes hands it to a kernel that takes plain numbers."""
    return int(value.item()) if type(optimizer).__module__.startswith("bitsandbytes.") else value
