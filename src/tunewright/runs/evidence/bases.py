"""The base as a model, for gauges that look inside: adapters off, as it was before training. Knows Sides alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from tunewright.contracts import Loaded
from tunewright.engine.precision import compute_in
from tunewright.errors import TunewrightError
from tunewright.models import quantize
from tunewright.recipe import ModelSpec
from tunewright.runs.evidence.sides import NotRun, Sides


def base_model(sides: Sides) -> nn.Module:
    """The base in the tuned model's shape, also where a rule (majority) stands for its answers.

    Its modules named in `loaded.fresh` are random and mean nothing. Raises NotRun where it cannot be opened.
    """
    if sides.base is not None:
        return sides.base.eval()
    if sides.trunk is not None:
        return sides.trunk().eval()
    return opened(sides, sides.loaded.labels).model.eval()


def opened(sides: Sides, labels: tuple[str, ...]) -> Loaded:
    """The base's checkpoint once more. labels: () for the head that it came with. Raises NotRun if it is not there."""
    origin = sides.loaded.origin
    if not origin.get("checkpoint"):
        raise NotRun("nobody says where the base's weights lie")
    spec = ModelSpec(checkpoint=origin["checkpoint"], revision=origin.get("revision") or None)
    try:
        return sides.task.load(spec, labels)
    except TunewrightError as error:
        raise NotRun(f"the base cannot be opened again: {str(error).splitlines()[0].rstrip('.')}") from error


def plain_base(sides: Sides) -> nn.Module:
    """`base_model` with weights of 32 bits, where it is stored in fewer."""
    base = base_model(sides)
    return quantize.dequantized(base) if quantize.is_quantized(base) else base


@contextlib.contextmanager
def asking(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode, no gradients, the precision of its weights; both sides are asked like this. The model's device."""
    first = next(model.parameters())
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    model.eval()
    with torch.inference_mode(), compute_in("bf16" if half else "float32", first.device):
        yield first.device
