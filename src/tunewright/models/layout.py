"""Where a model's parts are: embedding, blocks, head. Found by structure, so that no family is named here.

Knows torch modules and nothing of tasks or methods. What structure cannot tell would stand in a small table here.
"""

from __future__ import annotations

from typing import TypeGuard
from weakref import WeakKeyDictionary

from torch import nn

from tunewright.contracts import Layout

# What structure cannot tell: which product of an attention makes the keys and which the values. Last name segments.
KEYS = ("key", "k_proj", "k_lin", "k", "wk", "key_proj")
VALUES = ("value", "v_proj", "v_lin", "v", "wv", "value_proj")
FUSED = ("c_attn", "query_key_value", "qkv", "qkv_proj", "Wqkv", "in_proj")  # queries, keys and values in one product


def layout_of(model: nn.Module, head: str | None = None) -> Layout:
    """The layout of any model. `head`: the top-level name of the last layer where the loader knows it."""
    blocks = _blocks(model)
    head = head or _head(model, blocks)
    inside = [n for n in linear_names(model) if within(n, blocks)]
    attention = tuple(n for n in inside if "att" in n.rpartition(".")[0].lower())
    mlp = tuple(n for n in inside if n not in attention)
    return Layout(blocks, _embedding(model), head, attention, mlp)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    """Children of the outermost module lists that repeat: transformer layers, stages of a convolutional net."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList) and len(module) >= 2 and not inside:
            found += [f"{name}.{i}" for i in range(len(module))]
    return tuple(found)


def _embedding(model: nn.Module) -> str | None:
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(table, nn.Embedding):
        return None
    return next(name for name, module in model.named_modules() if module is table)


def _head(model: nn.Module, blocks: tuple[str, ...]) -> str | None:
    """The top-level child that holds the last linear layer outside the blocks and outside the pre-trained body."""
    body = getattr(model, "base_model_prefix", "")
    last = None
    for name, module in model.named_modules():
        outside = not any(name.startswith(f"{block}.") for block in blocks) and name.partition(".")[0] != body
        if isinstance(module, nn.Linear) and outside:
            last = name.partition(".")[0]
    return last


def speaks_words(model: nn.Module, head: str) -> bool:
    """Whether a head's outputs are the vocabulary: it is part of the language and not of one task."""
    try:
        words = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False
    return words is not None and words is model.get_submodule(head)


def within(name: str, places: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the places or lies beneath one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def linear_names(model: nn.Module, without: tuple[str, ...] = ()) -> list[str]:
    """Every matrix product: linear layers, GPT-2's Conv1D, and convolutions that mix channels (groups = 1).

    Depthwise convolutions are left out: a low-rank product has nothing to mix there, and peft cannot merge it.
    """
    names = []
    for name, module in model.named_modules():
        product = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        mixing = isinstance(module, nn.Conv2d) and module.groups == 1
        if (product or mixing) and not within(name, without):
            names.append(name)
    return names


def max_positions(model: nn.Module) -> int | None:
    """How many tokens fit. A position table with a padding index (RoBERTa) begins behind it; None: no limit stated."""
    if model not in _TABLES:
        _TABLES[model] = next((m for name, m in model.named_modules() if _is_padded_table(name, m)), None)
    table = _TABLES[model]
    if table is not None and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    stated: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return stated


# model -> its position table with a padding index: every row asks, and going through all modules took half of encoding
_TABLES: WeakKeyDictionary[nn.Module, nn.Embedding | None] = WeakKeyDictionary()


def _is_padded_table(name: str, module: nn.Module) -> TypeGuard[nn.Embedding]:
    embedding = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
    return embedding and module.padding_idx is not None
