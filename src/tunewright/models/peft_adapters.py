"""What every adapter that goes through peft needs: putting on, saving, opening, in PEFT's own format.

Knows peft and what must travel with an adapter; not which adapter it is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tunewright.contracts import Loaded
from tunewright.models.surgery import train_in_float32

# What a model may read off a convolution besides calling it (MobileNetV2 pads by hand); peft's wrappers lack them.
ATTRIBUTES = ("stride", "kernel_size", "dilation")
LENDING = [
    "for layer in model.modules():  # this model reads these off its convolutions, and peft's wrappers lack them",
    '    if isinstance(getattr(layer, "base_layer", None), torch.nn.Conv2d):',
    "        inner = layer.base_layer",
    "        layer.stride, layer.kernel_size, layer.dilation = inner.stride, inner.kernel_size, inner.dilation",
]


def put_on(model: nn.Module, config: Any, loaded: Loaded) -> nn.Module:
    """The model with a new adapter; what trains is float32. config: peft's, for the kind of adapter."""
    import peft

    with between_libraries():
        adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    # peft writes where the weights lay on this machine; the id as the user gave it means something elsewhere
    config.base_model_name_or_path = loaded.origin.get("checkpoint")
    config.revision = loaded.origin.get("revision") or None
    lend_attributes(adapted)
    train_in_float32(adapted)
    return adapted


def save(model: nn.Module, loaded: Loaded, folder: Path) -> None:
    """An adapter that plain peft opens, with label names and processor beside it."""
    model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]  # none was trained
    model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]  # label names stand here
    loaded.processor.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours stands in the run folder


def reopen(loaded: Loaded, folder: Path) -> nn.Module:
    """What `save` wrote, on its base again."""
    import peft

    with between_libraries():
        adapted = peft.PeftModel.from_pretrained(loaded.model, str(folder))  # type: ignore[arg-type]
    lend_attributes(adapted)
    return adapted


def opening(loaded: Loaded, lines: list[str]) -> list[str]:
    """The lines that open an adapter, with those that a convolutional net needs beside them."""
    convolutional = any(isinstance(module, nn.Conv2d) for module in loaded.model.modules())
    return ["import torch", *lines, *LENDING] if convolutional else lines


def lend_attributes(model: nn.Module) -> None:
    """Give the wrappers of convolutions what a model may read off them."""
    for module in model.modules():
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, nn.Conv2d):
            for name in ATTRIBUTES:
                setattr(module, name, getattr(inner, name))


@contextlib.contextmanager
def between_libraries() -> Iterator[None]:
    """Without the deprecations that peft and transformers owe each other: a user can mend none of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
