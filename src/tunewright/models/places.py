"""Where additions to a model go: the ends of its sub-layers, its keys and values, and the head that trains along.

Found by structure: what stands in Layout, widths that fit together, lists that repeat. Knows no model class and no
method; what structure cannot tell is a word in a name ("att" in layout.py, "expert" here).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from tunewright.contracts import Layout, Loaded
from tunewright.models.layout import FUSED, KEYS, VALUES, linear_names, speaks_words, within
from tunewright.models.masks import expert_modules


@dataclass(frozen=True)
class Place:
    """One sub-layer: the module whose output ends it, and the module whose input begins it; they may be the same."""

    writes: str
    reads: str
    width: int  # of what `writes` gives: features of the last axis, or channels of a picture
    width_in: int  # of what `reads` is given
    convolution: bool = False


def whole_head(loaded: Loaded) -> tuple[str, ...]:
    """The modules that are the head: new ones, or else the layout's; () where there is none."""
    return loaded.fresh or ((loaded.layout.head,) if loaded.layout.head else ())


def own_head(model: nn.Module, loaded: Loaded) -> tuple[str, ...]:
    """What trains whole beside any addition: new modules, or else the head of the task, unless it is the vocabulary.

    A language model's head is often its embedding too: a trained copy would come apart from it.
    """
    return loaded.fresh or tuple(name for name in whole_head(loaded) if not speaks_words(model, name))


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a matrix product: a linear layer, GPT-2's Conv1D (stored the other way round), a convolution."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inside, outside = module.weight.shape  # type: ignore[union-attr,misc]
    return inside, outside


def units(model: nn.Module, layout: Layout) -> tuple[str, ...]:
    """The layers that repeat, one by one, shallow to deep: blocks, or the layers inside a block that is a stage."""
    return tuple(unit for block in layout.blocks for unit in _inner(model, block))


def _inner(model: nn.Module, block: str) -> list[str]:
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        children = list(module.children())
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and children
        alike = len({type(child) for child in children}) == 1
        # a layer has two products at least: a list of single convolutions is the inside of one layer
        if listed and alike and "expert" not in name and all(len(linear_names(child)) > 1 for child in children):
            return [unit for i in range(len(children)) for unit in _inner(model, f"{name}.{i}")]
    return [block]


# -------------------------------------------------------------------- sub-layers
def feed_forwards(model: nn.Module, layout: Layout) -> list[Place]:
    """The feed-forward sub-layer of every unit: all experts of a mixture together, a convolutional unit as a whole."""
    mixtures = {owner.rpartition(".")[0] for owner in _experts(model)}
    found = []
    for unit in units(model, layout):
        mlp = [name for name in layout.mlp if within(name, (unit,))]
        linear = [name for name in mlp if not isinstance(model.get_submodule(name), nn.Conv2d)]
        if mixture := next((name for name in mixtures if within(name, (unit,))), None):
            found += _mixture(model, layout, unit, mixture)
        elif linear:
            found += _linear(model, linear)
        elif mlp:
            found += [_convolutional(model, unit, mlp)]
    return found


def attentions(model: nn.Module, layout: Layout) -> list[Place]:
    """Every attention of every unit, cross-attention by itself; none in a convolutional net."""
    found = []
    for unit in units(model, layout):
        groups: dict[str, list[str]] = {}
        for name in [name for name in layout.attention if within(name, (unit,))]:
            groups.setdefault(_attention_of(name, unit), []).append(name)
        for group in groups.values():
            found += _linear(model, group)
    return found


def _attention_of(name: str, unit: str) -> str:
    """The part of a product's name that says which attention of the unit it belongs to."""
    segments = name.removeprefix(f"{unit}.").split(".")[:-1]
    last = next((i for i, segment in enumerate(segments) if "att" in segment.lower()), -1)
    return ".".join(segments[: last + 1])


def _linear(model: nn.Module, products: list[str]) -> list[Place]:
    """From the first product to the last one that is as wide as what went in; [] if there is none."""
    ends = [name for name in products if name != products[0] and _out(model, name) == _in(model, products[0])]
    if not ends:
        return []
    beside = [name for name in products if name.rpartition(".")[0] == ends[-1].rpartition(".")[0]]
    first = beside[0] if len(beside) > 1 else products[0]
    return [Place(ends[-1], first, _out(model, ends[-1]), _in(model, first))]


def _mixture(model: nn.Module, layout: Layout, unit: str, mixture: str) -> list[Place]:
    """The module that holds router and experts; its width is that of the attention beside it."""
    beside = [name for name in layout.attention if within(name, (unit,))]
    width = _in(model, beside[0]) if beside else 0
    return [Place(mixture, mixture, width, width)] if beside else []


def _convolutional(model: nn.Module, unit: str, mlp: list[str]) -> Place:
    """The unit as a whole, behind its batch norm and its residual; widths of its first and last convolution."""
    first = next(m for m in model.get_submodule(unit).modules() if isinstance(m, nn.Conv2d))
    return Place(unit, unit, _out(model, mlp[-1]), first.in_channels, convolution=True)


def _experts(model: nn.Module) -> Iterator[str]:
    """Modules that hold the experts of a layer: fused into one tensor, or as a list."""
    yield from expert_modules(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2]:
            yield name


def _in(model: nn.Module, name: str) -> int:
    return widths(model.get_submodule(name))[0]


def _out(model: nn.Module, name: str) -> int:
    return widths(model.get_submodule(name))[1]


# -------------------------------------------------------------- single products
def keys_and_values(layout: Layout) -> tuple[list[str], bool]:
    """The products that make keys and values, and whether queries come out of the same product and cannot be parted."""
    apart = _ending(layout.attention, (*KEYS, *VALUES))
    return (apart, False) if apart else (_ending(layout.attention, FUSED), True)


def _ending(names: Iterable[str], segments: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.rpartition(".")[2] in segments]


def down_projections(model: nn.Module, layout: Layout) -> list[str]:
    """The products that end a feed-forward sub-layer, of listed experts all: what goes in is the inner activation."""
    found = []
    for unit in units(model, layout):
        names = [name for name in layout.mlp if within(name, (unit,))]
        products = [name for name in names if not isinstance(model.get_submodule(name), nn.Conv2d)]
        hidden = _in(model, products[0]) if products else 0
        back = [name for name in products[1:] if _out(model, name) == hidden]
        found += [name for name in back if _in(model, name) != hidden or name == back[-1]]
    return found
