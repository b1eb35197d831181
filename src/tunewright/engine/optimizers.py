"""Optimisers by name, and their state by parameter name. Knows torch.optim; knows no model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunewright.engine import eight_bit

LATE_WARMUP = 10  # steps over which newly unfrozen groups reach their rate, a twentieth of a short run's at most
# Adam with bias correction (without it short runs on few rows are unstable), and no decay unless the group says so.
MAKERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=_in_one_pass(groups)),
    "adamw_8bit": eight_bit.adamw,
    "sgd": lambda groups: torch.optim.SGD(groups),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
}


def build(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser over (name, parameter) pairs; each group remembers its rate as `initial_lr`."""
    optimizer = MAKERS[name]([g for g in groups if g["params"]])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _in_one_pass(groups: list[dict[str, Any]]) -> bool:
    """Whether torch has a kernel that updates everything in one pass: floats on a CPU or a CUDA device."""
    parameters = [p for group in groups for _, p in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def set_rate(optimizer: torch.optim.Optimizer, factor: float, step: int = 0, total: int = 1, warmup: int = 0) -> float:
    """Scale every group's own rate; returns the largest.

    A group that began to train later ("since", as progress) is warmed up from there: its moments are cold.
    """
    for group in optimizer.param_groups:
        began = math.ceil(group.get("since", 0.0) * total - 1e-9)  # 0.1 * 3 is a hair more than 0.3
        own = max(warmup, min(LATE_WARMUP, total // 20)) if began else 0
        group["lr"] = group["initial_lr"] * factor * min(1.0, (step - began + 1) / (own + 1))
    return max(group["lr"] for group in optimizer.param_groups)


def state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter name>::<key>` -> tensor; numbers become tensors, so that safetensors can hold them."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    # a table that parameters share (the values of 8 bits) is written for each: no aliases in a file
                    tensors[f"{name}::{key}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
                    seen.add(tensor.data_ptr())
    return tensors


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_by_name` gave. Names that are not trained here are an error of ours."""
    by_name = {n: p for g in optimizer.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    for full, value in tensors.items():
        name, _, key = full.partition("::")
        parameter = by_name[name]
        counts = key == "step" and not optimizer.defaults.get("fused")  # elsewhere torch counts steps on the CPU
        value = value if counts else value.to(parameter.device)
        if key != "step" and value.shape == parameter.shape:
            # kernels that go over weights and moments at once take both to be laid out alike (channels innermost, say)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][key] = eight_bit.as_it_counts(optimizer, value) if key == "step" else value
