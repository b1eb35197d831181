"""What LoRA needs around peft: starts that leave the base alone, folding, saving.

A start from the weights (PiSSA: Meng et al. 2024, arXiv 2404.02948; OLoRA: Buyukakyuz 2024, arXiv 2406.01775) gives
A and B values whose product must be taken off again, so that training begins at the base. Others take it off the
base's weights; here a frozen copy (A0, B0) is subtracted beside them: W + s (B A - B0 A0). The base stays bit-equal,
can be asked as a reference, and the result is an ordinary adapter of rank 2 r: [A; A0], [B, -B0]. Knows peft's LoRA
layers, no method and no task.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunewright.contracts import Loaded
from tunewright.models import peft_adapters, quantize

NAME = "default"  # the adapter's name in peft
FROM_WEIGHTS = ("pissa", "olora")
LEAST_KEPT = 32  # directions of the inputs carried from batch to batch: more than are asked for, so that none is lost


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every wrapped layer with a product of its own."""
    from peft.tuners.lora import LoraLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and NAME in getattr(m, "lora_A", {})]


# ---------------------------------------------------------------- starts from weights
def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The wrapped layers that are one matrix: no convolution, no expert."""
    experts = _wrapper_of_parameters()
    return {
        name: layer
        for name, layer in lora_layers(model)
        if not isinstance(layer, experts) and not isinstance(layer.base_layer, nn.modules.conv._ConvNd)
    }


def without_length(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named layers that have an output with weights of 0 alone: DoRA would divide its length by itself.

    Seen in MobileNetV2, where pruned channels are 0: every loss is NaN from the first step.
    """
    weights = {name: quantize.matrix(model.get_submodule(name)) for name in names}
    return [name for name, matrix in weights.items() if not matrix.flatten(1).any(1).all()]


def _wrapper_of_parameters() -> type:
    from peft.tuners.lora.layer import ParamWrapper

    return ParamWrapper


def start_from_weights(model: nn.Module, how: str) -> None:
    """A and B of every linear layer begin as a part of its weight; (A0, B0), the same, is taken off beside them.

    Convolutions and experts begin as usual, at nothing.
    """
    for layer in linear_layers(model).values():
        a, b = _parts(quantize.matrix(layer.base_layer), layer.r[NAME], layer.scaling[NAME], how)
        rank = len(a)  # of a matrix with fewer rows than r it is lower; what is left over begins as usual
        layer.lora_A[NAME].weight.data[:rank] = a
        layer.lora_B[NAME].weight.data[:, :rank] = b
        layer.register_buffer("start_A", layer.lora_A[NAME].weight.detach().clone(), persistent=False)
        layer.register_buffer("start_B", layer.lora_B[NAME].weight.detach().clone(), persistent=False)
        layer.register_forward_hook(_take_off)


def _parts(matrix: Tensor, r: int, scale: float, how: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r). pissa: scale B A = the top r of the singular values; olora: B A = the first r of QR.

    Fewer than r where the matrix has not as many rows or columns.
    """
    if how == "olora":
        q, upper = torch.linalg.qr(matrix)
        return upper[:r], q[:, :r]
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root.unsqueeze(1) * v[:r], u[:, :r] * root


def _take_off(layer: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: the start's product, unless the adapter is switched off."""
    if layer.disable_adapters or layer.merged:
        return output
    x = given[0].to(layer.start_A.dtype)
    return output - layer.scaling[NAME] * (x @ layer.start_A.T @ layer.start_B.T).to(output.dtype)


def starts(model: nn.Module) -> dict[str, Tensor]:
    """(A0, B0) of every layer that has them: part of a checkpoint, since another machine's SVD differs in its signs."""
    names = ("start_A", "start_B")
    return {f"{n}.{k}": getattr(m, k).detach() for n, m in lora_layers(model) for k in names if hasattr(m, k)}


# ---------------------------------------------------------------- a start from inputs
def start_from_inputs(model: nn.Module, passes: Iterable[object]) -> None:
    """A of every linear layer becomes the top r right singular vectors of what flows into it while `passes` run.

    EVA: Paischer et al. 2024, arXiv 2410.07170, without moving ranks between layers. Padding is left out. The inputs
    themselves are never kept: after each batch a layer has `kept` rows, S V^T, with the same main directions.
    """
    layers = linear_layers(model)
    found: dict[str, Tensor] = {}
    masks: list[Tensor | None] = [None]

    def called(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        masks[0] = named.get("attention_mask")

    def looker(name: str) -> Any:
        def hook(layer: Any, given: tuple[Any, ...]) -> None:
            if layer.disable_adapters:
                return
            rows = _tokens(given[0].detach().float(), masks[0])
            rows = torch.cat([found[name], rows]) if name in found else rows
            kept = min(max(4 * layer.r[NAME], LEAST_KEPT), *rows.shape)
            with _one_thread(), torch.autocast(rows.device.type, enabled=False):
                _, s, v = torch.svd_lowrank(rows, kept)
            found[name] = s.unsqueeze(1) * v.T

        return hook

    handles = [model.register_forward_pre_hook(called, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(looker(name)) for name, layer in layers.items()]
    model.eval()  # dropout would be noise in what is looked at
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for _ in passes:
                pass
    finally:
        for handle in handles:
            handle.remove()
    for name, rows in found.items():
        weight = layers[name].lora_A[NAME].weight
        main = nn.functional.normalize(rows[: len(weight)])
        weight.data[: len(main)] = main  # fewer where fewer rows were seen


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For decompositions of small matrices: on a busy machine threads wait for one another, a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(N, D) of (..., D), without padding. mask: (B, T), or another shape that says nothing about these inputs."""
    if mask is not None and inputs.ndim == 3 and mask.shape == inputs.shape[:2]:
        return inputs[mask.bool()]
    return inputs.flatten(0, -2)


# ---------------------------------------------------------------------------- keeping
def folded(model: nn.Module) -> nn.Module:
    """The plain model with the product added to its weights, in float32; the given one stays as it is.

    A quantised base is taken out of its few bits first: folding into 4 bits would round the change away.
    """
    plain = quantize.dequantized(model) if quantize.is_quantized(model) else copy.deepcopy(model)
    plain = plain.float()
    for _, layer in lora_layers(plain):
        if hasattr(layer, "start_A"):
            change = layer.scaling[NAME] * layer.start_B @ layer.start_A
            flip = type(layer.base_layer).__name__ == "Conv1D"
            layer.base_layer.weight.data -= change.T if flip else change
    return plain.merge_and_unload(safe_merge=True)  # type: ignore[operator]


def save(model: nn.Module, loaded: Loaded, folder: Path) -> None:
    """As every adapter; one that began as a part of the weights becomes plain LoRA of twice the rank."""
    peft_adapters.save(model, loaded, folder)
    if taken := {name: layer for name, layer in lora_layers(model) if hasattr(layer, "start_A")}:
        _double_rank(folder, taken)


def _double_rank(folder: Path, taken: dict[str, Any]) -> None:
    """Rewrite the saved adapter as one of rank 2 r: [A; A0] and [B, -B0], at the same scale."""
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    config = json.loads(settings.read_text(encoding="utf-8"))
    for name, layer in taken.items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a] = torch.cat([tensors[a], layer.start_A.to(tensors[a])]).contiguous()
        tensors[b] = torch.cat([tensors[b], -layer.start_B.to(tensors[b])], dim=1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    own = {n: tensors[f"{n}.lora_A.weight"].shape[0] for n in taken}
    scale = next(iter(taken.values())).scaling[NAME]
    pattern = {n.removeprefix("base_model.model."): rank for n, rank in own.items()}
    config["rank_pattern"] = pattern
    config["alpha_pattern"] = {
        n: scale * (math.sqrt(rank) if config["use_rslora"] else rank) for n, rank in pattern.items()
    }
    settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
