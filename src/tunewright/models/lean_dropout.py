"""Dropout whose mask is drawn four places at a time: sixteen random bits for each, from torch's own generator.

torch draws every place by itself, which is a twelfth of a training step of a small text encoder. A place is kept with
the probability of 1 - p to the nearest 1/65536 (0.1 becomes 0.100006), and what is kept is divided by that very
probability, so that the mean stays what it was. Only on a CPU and in float32; elsewhere, and where nothing is dropped,
torch's own dropout. Knows nothing of the model around it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 1 << 16  # values of sixteen bits


def make_lean_dropouts(model: nn.Module) -> str:
    """Give every plain dropout of the model the quicker draw; a sentence if there are some that run on a CPU."""
    found = [module for module in model.modules() if type(module) is nn.Dropout and not module.inplace]
    for module in found:
        module.__class__ = LeanDropout
    on_cpu = next((p.device.type for p in model.parameters()), "cpu") == "cpu"
    return f"Dropout of {len(found)} layers is drawn four places at a time on this CPU." if found and on_cpu else ""


def suits(x: Tensor, p: float) -> bool:
    """Whether something is dropped here, and some of it kept, in a way that `kept` draws."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and 0 < round(p * STEPS) < STEPS


def kept(shape: torch.Size, p: float) -> Tensor:
    """(shape) float32: 0 where a place is dropped, else one over the probability of being kept."""
    dropped = round(p * STEPS)
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)[:count]
    return (bits >= dropped - STEPS // 2).to(torch.float32).mul_(STEPS / (STEPS - dropped)).view(shape)


class LeanDropout(nn.Dropout):
    """torch's dropout with another draw."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not suits(input, self.p):
            return super().forward(input)
        return input * kept(input.shape, self.p)


LeanDropout.__name__ = LeanDropout.__qualname__ = nn.Dropout.__name__  # who prints or asks for names finds torch's
