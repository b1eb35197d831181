"""Activations wait in the machine's memory, pinned, until the backward pass asks for them (`train.activation_offload`).

After torch.autograd.graph.save_on_cpu, which would also carry every weight back and forth. No number changes: bytes go
and come back. Knows tensors and devices; no model.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

LEAST = 1 << 16  # bytes; smaller ones are not worth a transfer
Packed = Tensor | tuple[torch.device, Tensor]


def useless(device: torch.device) -> str:
    """Why it cannot help on this device; "" where it can."""
    return "" if device.type == "cuda" else "activations are in the machine's memory already: there is no GPU here"


def activations_on_host(model: nn.Module, asked: bool) -> AbstractContextManager[object]:
    """Within: what a forward pass saves for its backward pass leaves the GPU; weights and buffers stay."""
    if not asked:
        return contextlib.nullcontext()
    # by place in memory: what is saved is a tensor of its own, or a view (transposed for a product)
    staying = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def leave(tensor: Tensor) -> Packed:
        is_small = tensor.nbytes < LEAST or tensor.layout is not torch.strided
        if is_small or tensor.untyped_storage().data_ptr() in staying:
            return tensor
        return tensor.device, _to_host(tensor)

    return torch.autograd.graph.saved_tensors_hooks(leave, _come_back)


def _to_host(tensor: Tensor) -> Tensor:
    pinned = tensor.device.type == "cuda"
    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    # without waiting: on one stream, the GPU's memory is used again only after the copy
    return host.copy_(tensor, non_blocking=pinned)


def _come_back(packed: Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)
