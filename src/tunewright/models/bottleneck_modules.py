"""A small network beside a frozen module: down to few numbers, GELU, up again; and a head that keeps its original.

Both hang on the module they change and can be switched off. Knows torch modules and places, not tasks or methods.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models.places import Place


class Adapter(nn.Module):
    """up(gelu(down(x))), with up = 0 at first. Linear over the last axis, or as 1 x 1 convolutions over channels.

    size:  how many numbers are between down and up.
    scale: None where it is added to its own input; a number where x is the input of the sub-layer it stands beside,
           and what it gives is multiplied by this and added to the sub-layer's output.
    """

    def __init__(self, place: Place, size: int, scale: float | None) -> None:
        super().__init__()
        layer = functools.partial(nn.Conv2d, kernel_size=1) if place.convolution else nn.Linear
        self.down = layer(place.width if scale is None else place.width_in, size)
        self.gelu = nn.GELU()
        self.up = layer(size, place.width)
        for tensor in self.parameters():
            nn.init.zeros_(tensor)
        # small: Houlsby 2019 finds deviations up to 1e-2 equally good and larger ones worse
        nn.init.normal_(self.down.weight, std=1e-2)
        self.place, self.size, self.scale = place, size, scale
        self.off = False
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.gelu(self.down(x)))

    def read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook: what the sub-layer is given, kept until `change` asks for it."""
        if not self.off:
            self.seen = args[0]

    def change(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook: what the sub-layer gives, changed. Of a tuple the first."""
        if self.off:
            return output
        out = output[0] if isinstance(output, tuple) else output
        # float32 inside, as all that trains; the trunk may be in half precision
        new = out + self._addition(out).to(out.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _addition(self, out: Tensor) -> Tensor:
        if self.scale is None:
            return self(out.float())
        x, self.seen = self.seen, None
        assert x is not None
        return self.scale * self(_like(x, out).float())


def _like(x: Tensor, out: Tensor) -> Tensor:
    """A picture thinned to the height and width of another one, as a strided 1 x 1 convolution would."""
    if x.ndim != 4 or x.shape[2:] == out.shape[2:]:
        return x
    down, across = (-(-x.shape[axis] // out.shape[axis]) for axis in (2, 3))
    return x[:, :, ::down, ::across]


class Head(nn.Module):
    """A head that trains, and beside it the head as it was, for the time when the change is switched off."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.tuned = copy.deepcopy(base).float().requires_grad_(True)
        self.off = False

    def forward(self, *args: Any, **named: Any) -> Any:
        return (self.base if self.off else self.tuned)(*args, **named)


# ------------------------------------------------------------ putting on, switching
def attach(model: nn.Module, place: Place, size: int, scale: float | None) -> None:
    """Put an adapter at a place. Hooks and not a wrapper: the base keeps its modules, and its tensors their names."""
    site = model.get_submodule(place.writes)
    added = Adapter(place, size, scale).to(next(site.parameters()).device)
    site.bottleneck = added
    # methods of the adapter itself: a copy of the model calls the copy of the adapter
    site.register_forward_hook(added.change)
    if scale is not None:
        model.get_submodule(place.reads).register_forward_pre_hook(added.read)


def keep_head(model: nn.Module, name: str) -> None:
    """Let a head train and keep the original."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, Head(model.get_submodule(name)))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """By their names in the model: that of the module whose output they change, and "bottleneck"."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def heads(model: nn.Module) -> dict[str, Head]:
    """By the name that they have in the plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Head)}


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base, for the length of a `with` block."""
    own: list[Adapter | Head] = [*adapters(model).values(), *heads(model).values()]
    before = [module.off for module in own]
    for module in own:
        module.off = True
    try:
        yield model
    finally:
        for module, was in zip(own, before, strict=True):
            module.off = was


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by the names that it has in a plain model with adapters."""
    tuned: dict[str, nn.Module] = {name: head.tuned for name, head in heads(model).items()} | adapters(model)
    return {f"{owner}.{name}": tensor for owner, part in tuned.items() for name, tensor in part.state_dict().items()}


def put_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What `tensors_of` gave, into a model with the same adapters. Raises KeyError for one that is missing."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(tensors[name])
