"""Freezing done right: what does not train has no gradient, stands in eval mode and keeps its buffers.

Knows torch modules only.
"""

from __future__ import annotations

import torch
from torch import nn

from tunewright.errors import Fault, MethodError
from tunewright.models.layout import within
from tunewright.models.quantize import weights_of

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


def freeze(model: nn.Module, except_for: tuple[str, ...] = ()) -> None:
    """Only what lies in the named modules trains, in float32; everything else is frozen, gradients dropped."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(within(name, except_for))
        parameter.grad = None
    train_in_float32(model)


def train_in_float32(model: nn.Module) -> None:
    """Trainable weights in float32: pure bf16 leaves 12 to 98 % of them unmoved (docs/facts.md).

    Buffers beside them too. Raises MethodError for weights in few bits, which cannot train.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_floating_point():
            remedy = "Use method=lora, ia3, bottleneck or prefix, or leave model.quantize out."
            problem = f"{name} is stored in few bits, which cannot train"
            raise MethodError(Fault(problem, where="model.quantize", remedy=remedy))
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    for module in model.modules():  # a batch norm takes its statistics only as its weights are
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for buffer in module.buffers(recurse=False):
                buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data


def stores_half(model: nn.Module) -> bool:
    """Whether some weights are in half precision: beside float32 ones, which train, products then need autocast."""
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


def set_mode(model: nn.Module, *, dropout: bool = True, train_batch_norm: bool = False) -> None:
    """Train mode only where something trains: dropout in a frozen trunk is noise, batch-norm statistics drift.

    A module without parameters (dropout) follows its parent. Batch norms keep their statistics unless asked.
    """
    if not dropout:
        model.eval()
    else:
        _follow(model, True, _training_parts(model))
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.train(train_batch_norm and any(p.requires_grad for p in module.parameters()))


def _training_parts(model: nn.Module) -> dict[nn.Module, bool]:
    """Of every module that holds parameters, whether one of them trains. Asked in every step, so each is seen once."""
    found: dict[nn.Module, bool] = {}

    def visit(module: nn.Module) -> bool | None:
        if module not in found:
            own = [p.requires_grad for p in module.parameters(recurse=False)]
            beneath = [trains for child in module.children() if (trains := visit(child)) is not None]
            if not own and not beneath:
                return None
            found[module] = any(own) or any(beneath)
        return found[module]

    visit(model)
    return found


def _follow(module: nn.Module, parent_trains: bool, parts: dict[nn.Module, bool]) -> None:
    trains = parts.get(module, parent_trains)
    if module.training != trains:
        module.training = trains
    for child in module.children():
        _follow(child, trains, parts)


def channels_last(model: nn.Module, device: torch.device) -> str:
    """Store the filters of a convolutional net with channels innermost, as CPU kernels want them; a sentence if so.

    Inputs follow by themselves: a convolution lays out what it gives as its filters are laid out. A single convolution
    (the patches of a vision transformer) gains nothing. Not measured on a GPU, and not done there.
    """
    if device.type != "cpu" or sum(isinstance(module, nn.Conv2d) for module in model.modules()) < 2:
        return ""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return "Convolutions run with channels innermost, as the CPU's kernels want them; the model is saved as it was."


def plain_layout(model: nn.Module) -> None:
    """Undo `channels_last`: every tensor in the order in which it is written to files."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total), shared weights counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(weights_of(p) for p in parameters)
