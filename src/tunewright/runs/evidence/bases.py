"""The base as a model, for gauges that look inside: adapters off, as it was before training. Knows Sides alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from tunewright.contracts import Loaded
from tunewright.engine.precision import compute_in
from tunewright.errors import TunewrightError
from tunewright.models import quantize
from tunewright.recipe import ModelSpec
from tunewright.runs.evidence.sides import NotRun, Sides


def base_model(sides: Sides) -> tuple[nn.Module, Sides]:
    """The base in the tuned model's shape, also where a rule (majority) stands for its answers; and the sides, whose
    `loaded.fresh` now names all that the base does not have (there its weights are random and mean nothing), and whose
    `loaded.origin` is the base: a run that was opened again knows neither.

    Raises NotRun where it cannot be opened.
    """
    if sides.base is not None and sides.trunk is None:
        return sides.base.eval(), sides
    found = sides.trunk() if sides.trunk is not None else opened(sides, sides.loaded.labels)
    fresh = tuple(dict.fromkeys((*sides.loaded.fresh, *found.fresh)))
    return found.model.eval(), replace(sides, loaded=replace(sides.loaded, fresh=fresh, origin=found.origin))


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


def plain_base(sides: Sides) -> tuple[nn.Module, Sides]:
    """`base_model` with whole weights, where it is stored in a few bits each."""
    base, sides = base_model(sides)
    return (quantize.dequantized(base) if quantize.is_quantized(base) else base), sides


@contextlib.contextmanager
def asking(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode, no gradients, the precision of its weights; both sides are asked like this. The model's device."""
    first = next(model.parameters())
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    model.eval()
    with torch.inference_mode(), compute_in("bf16" if half else "float32", first.device):
        yield first.device
