"""Additions to frozen weights at fixed places, and which places deserve one. Knows modules, not tasks.

The forward pass sees base + values at `index`; the base tensor keeps its bytes and only `values` train, so that an
optimiser holds as many numbers as there are values. The places are a buffer: they never change while training.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tunewright.models.layout import within


class Addition(nn.Module):
    """What a frozen weight is given on top.

    values: float32; (k,) single weights, (k, ...) whole slices along the weight's first axis (experts), or the
            weight's own shape where everything in it trains.
    index:  (k,) int64, positions in the flattened weight or slices along its first axis; None: everything.
    """

    index: Tensor | None

    def __init__(self, values: Tensor, index: Tensor | None = None) -> None:
        super().__init__()
        self.values = nn.Parameter(values.float())
        self.register_buffer("index", index)
        self.off = False

    def forward(self, base: Tensor) -> Tensor:
        if self.off:
            return base
        if self.index is None:
            return (base.float() + self.values).to(base.dtype)
        units = base.float().reshape(-1, *self.values.shape[1:])
        return units.index_add(0, self.index, self.values).view_as(base).to(base.dtype)


# ------------------------------------------------------------- additions of a model
def additions(model: nn.Module) -> dict[str, Addition]:
    """By the name that the weight has in the plain model: "encoder.layer.0.output.dense.weight"."""
    return {
        f"{owner}.{name}".lstrip("."): chain[0]
        for owner, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name, chain in module.parametrizations.items()  # type: ignore[operator,union-attr]
        if isinstance(chain[0], Addition)
    }


def place_of(name: str) -> str | None:
    """The weight that a tensor of an addition belongs to; None for any other tensor of a model."""
    owner, sign, rest = name.partition("parametrizations.")
    weight, _, last = rest.partition(".0.")
    return f"{owner}{weight}" if sign and last in ("values", "index") else None


def put(model: nn.Module, place: str, values: Tensor, index: Tensor | None = None) -> None:
    """Give a weight this addition instead of any it has. Raises KeyError if the model has no such weight."""
    module, name = _owner(model, place)
    base = _weight(model, place)
    # copies: two weights with one index tensor would be one buffer, and the second would miss from what is saved
    own = [None if tensor is None else tensor.detach().to(base.device, copy=True) for tensor in (values, index)]
    addition = Addition(*own)  # type: ignore[arg-type]
    _rebuild(module, _own(module) | {name: addition})


def add(model: nn.Module, place: str, index: Tensor | None = None, *, slices: bool = False) -> None:
    """A zero addition: at `index` of the flattened weight, at whole `slices` along its first axis, or everywhere."""
    shape = _weight(model, place).shape
    size: Iterable[int] = shape if index is None else (len(index), *(shape[1:] if slices else ()))
    put(model, place, torch.zeros(*size), index)


def remove(model: nn.Module, place: str, *, folded: bool = False) -> None:
    """The plain weight again: as it was, or with its addition folded in."""
    module, name = _owner(model, place)
    tuned = getattr(module, name).detach() if folded else _weight(model, place).data
    _rebuild(module, {other: addition for other, addition in _own(module).items() if other != name})
    getattr(module, name).data = tuned


def _rebuild(module: nn.Module, own: dict[str, Addition]) -> None:
    """The module with exactly these additions, in the order of their names.

    A copy of a parametrised module shares its class, from which `remove_parametrizations` would take the property of
    the original too; and the order of parameters decides the last bit of a gradient's norm, so it may not depend on
    what was there before.
    """
    if parametrize.is_parametrized(module):
        bases = {name: chain.original for name, chain in module.parametrizations.items()}  # type: ignore[operator,union-attr]
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, base in bases.items():
            module.register_parameter(name, base)
    for name in sorted(own):
        parametrize.register_parametrization(module, name, own[name], unsafe=True)


def _own(module: nn.Module) -> dict[str, Addition]:
    if not parametrize.is_parametrized(module):
        return {}
    return {name: chain[0] for name, chain in module.parametrizations.items()}  # type: ignore[operator,union-attr]


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[nn.Module]:
    """The base, for the length of a `with` block."""
    own = list(additions(model).values())
    before = [addition.off for addition in own]
    for addition in own:
        addition.off = True
    try:
        yield model
    finally:
        for addition, was in zip(own, before, strict=True):
            addition.off = was


def _owner(model: nn.Module, place: str) -> tuple[nn.Module, str]:
    owner, _, name = place.rpartition(".")
    try:
        return model.get_submodule(owner), name
    except AttributeError as error:
        raise KeyError(place) from error


def _weight(model: nn.Module, place: str) -> nn.Parameter:
    """The stored base tensor, whether or not it has an addition."""
    module, name = _owner(model, place)
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index,union-attr,return-value]
    base = module._parameters[name]
    if base is None:
        raise KeyError(place)
    return base


# --------------------------------------------------------------------- candidates
def matrices(model: nn.Module, without: tuple[str, ...] = ()) -> list[str]:
    """Names of all weights of two axes or more that a single module owns; tables of words and experts included.

    A weight that two modules share is left out: with an addition to one of them they would come apart.
    """
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, p in named if p.ndim > 1 and owners[id(p)] == 1 and not within(name, without)]


def products(model: nn.Module, without: tuple[str, ...] = ()) -> list[str]:
    """The matrices that multiply: linear layers, convolutions (depthwise too), fused experts; no table, no router."""
    experts = expert_modules(model)
    routers = tuple(router for owner in experts for router in _routers(model, owner))
    found = []
    for place in matrices(model, (*without, *routers)):
        owner, _, name = place.rpartition(".")
        module = model.get_submodule(owner)
        multiplies = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"
        fused = owner in experts and getattr(module, name).ndim == 3
        if multiplies or fused:
            found.append(place)
    return found


def expert_modules(model: nn.Module) -> dict[str, list[str]]:
    """{module that holds all experts of a layer: its weights}, each with one slice an expert along the first axis.

    Known by structure: a weight of three axes (no convolution), beside a router that has one row for each expert.
    """
    found = {}
    for owner, module in model.named_modules():
        own = {f"{owner}.{name}": p for name, p in module.named_parameters(recurse=False)}
        if any(p.ndim == 3 for p in own.values()) and not isinstance(module, nn.modules.conv._ConvNd) and owner:
            count = num_experts(module)
            if count > 1 and _routers(model, owner):
                found[owner] = [place for place, p in own.items() if p.ndim > 1 and p.shape[0] == count]
    return found


def num_experts(module: nn.Module) -> int:
    """How many slices the fused weights of a module have."""
    return next(p.shape[0] for p in module.parameters() if p.ndim == 3)


def _routers(model: nn.Module, owner: str) -> list[str]:
    """The siblings of fused experts that score them."""
    parent, _, own = owner.rpartition(".")
    count = num_experts(model.get_submodule(owner))
    siblings = model.get_submodule(parent).named_children()
    scoring = [n for n, m in siblings if n != own and any(p.ndim == 2 and len(p) == count for p in m.parameters())]
    return [f"{parent}.{name}".lstrip(".") for name in scoring]


# ---------------------------------------------------------------------- selection
def highest(scores: dict[str, Tensor], share: float, scope: Literal["global", "tensor"]) -> dict[str, Tensor]:
    """Positions (ascending) of the highest scores: the share of all weights together, or of each tensor.

    Exactly round(share * count) of them, at least one; a tensor that gets none is not in the answer.
    """
    if scope == "tensor":
        return {place: _best(score.flatten(), share) for place, score in scores.items()}
    chosen = _best(torch.cat([score.flatten() for score in scores.values()]), share)
    found, start = {}, 0
    for place, score in scores.items():
        inside = chosen[(chosen >= start) & (chosen < start + score.numel())] - start
        start += score.numel()
        if len(inside):
            found[place] = inside
    return found


def _best(scores: Tensor, share: float) -> Tensor:
    return scores.topk(max(1, round(share * len(scores))), sorted=False).indices.sort().values


def absolute_gradients(model: nn.Module, places: Iterable[str], costs: Iterable[Tensor]) -> dict[str, Tensor]:
    """The sum over `costs` of |d cost / d base weight|, in float32; `costs` is drawn from one at a time.

    A hook adds each dense gradient up as soon as it exists and hands on a zero that takes no memory, so that two
    numbers a weight exist at once (base and sum) and the gradients of all tensors never do.
    """
    bases = {place: _weight(model, place) for place in places}
    totals = {place: torch.zeros_like(base, dtype=torch.float32) for place, base in bases.items()}

    def adder(total: Tensor) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            total.add_(gradient.abs())
            return gradient.new_zeros(()).expand_as(gradient)

        return hook

    handles = []
    try:
        for place, base in bases.items():
            base.requires_grad_(True)
            handles.append(base.register_hook(adder(totals[place])))
        with switched_off(model):
            for cost in costs:
                torch.autograd.grad(cost, list(bases.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for base in bases.values():
            base.requires_grad_(False)
    return totals


@contextlib.contextmanager
def counted_tokens(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """{module of experts: (E,) how many times a token was sent to each}, while a `with` block runs the model.

    Read off the call: fused experts are given, beside the tokens, which experts each token goes to (tokens, k). Padding
    is not counted where the model is called with a mask of as many tokens.
    """
    sizes = {owner: num_experts(model.get_submodule(owner)) for owner in expert_modules(model)}
    counts = {owner: torch.zeros(size, dtype=torch.int64) for owner, size in sizes.items()}
    masks: list[Tensor | None] = [None]

    def called(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        masks[0] = named.get("attention_mask")

    def counter(owner: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
            for sent in [x for x in tensors if not x.is_floating_point() and x.ndim == 2][:1]:
                mask = masks[0]
                fits = mask is not None and mask.ndim == 2 and mask.numel() == len(sent)
                kept = sent[mask.flatten().bool()] if fits and mask is not None else sent
                counts[owner] += torch.bincount(kept[kept < sizes[owner]].cpu(), minlength=sizes[owner])

        return hook

    handles = [model.register_forward_pre_hook(called, with_kwargs=True)]
    for owner in counts:
        handles.append(model.get_submodule(owner).register_forward_pre_hook(counter(owner), with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def most_used(counts: Tensor, share: float) -> Tensor:
    """The fewest experts (ascending) that take `share` of all tokens sent; of equals the first. counts: (E,) int64."""
    order = counts.argsort(descending=True, stable=True)
    reached = counts[order].cumsum(0).double() >= math.nextafter(share, 0) * int(counts.sum())
    return order[: int(reached.int().argmax()) + 1].sort().values
