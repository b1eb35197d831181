"""A base in 4 or 8 bits: `model.quantize: nf4` (Dettmers et al. 2023, arXiv 2305.14314) or `int8` (LLM.int8, 2022).

Through bitsandbytes. Its matrices are stored in few bits and made whole again for every product; what trains stands
beside them. Embeddings, norms and heads keep their precision. Knows bitsandbytes' layers, no method and no task.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tunewright.errors import Fault, ModelError

KINDS = ("Linear4bit", "Linear8bitLt")
EXTRA = 'pip install "tunewright[quant]"'
BITS = {"nf4": "4.13", "int8": "8"}  # a weight, constants included: blocks of 64, their constants in 8 bits


# bitsandbytes complains of kernels that it could fetch from the hub, whenever peft imports it; we never fetch code
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def settings(kind: str, keep: Sequence[str], device: str) -> Any:
    """transformers' BitsAndBytesConfig. keep: names of modules that stay as they are.

    Products are computed in float32 on a CPU (autocast may still lower them to bf16) and in bfloat16 on a GPU: left
    open, bitsandbytes takes whatever its first input happens to be, and a resumed run would be another run.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(Fault("bitsandbytes is not installed", where="model.quantize", remedy=f"{EXTRA}."))
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep))
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=list(keep),
        bnb_4bit_compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )  # fmt: skip


def loading_lines(kind: str, keep: Sequence[str]) -> list[str]:
    """Lines of Python that load a base as it was trained on: `few` is the argument quantization_config."""
    if kind == "int8":
        made = f"BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules={list(keep)!r})"
    else:
        made = (
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
            f'bnb_4bit_compute_dtype="float32", llm_int8_skip_modules={list(keep)!r})'
        )
    return ["from transformers import BitsAndBytesConfig", f"few = {made}"]


# After the base is loaded: without these a CPU with bf16 units repacks the weights and rounds otherwise.
SETTLING_LINES = [
    "for layer in base.modules():",
    '    if hasattr(layer, "support_avx512bf16_for_cpu"):',
    "        layer.support_avx512bf16_for_cpu = False",
]


def keep_whole(auto_class: str, config: Any) -> list[str]:
    """Modules that must keep their precision: what the checkpoint may lack (heads), and what speaks words."""
    import transformers

    from tunewright.models.layout import layout_of

    with torch.device("meta"):
        empty = getattr(transformers, auto_class).from_config(config)
    layout = layout_of(empty)
    outside = [n for n, m in empty.named_modules() if isinstance(m, nn.Linear) and not _inside(n, layout.blocks)]
    return sorted({layout.head or "lm_head", *outside})


def _inside(name: str, blocks: Sequence[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def settle(model: nn.Module, kind: str, where: str) -> str:
    """Make every product the same whenever it is asked, and say what was done. Raises ModelError if nothing was."""
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ in KINDS]
    if not layers:
        remedy = (
            "Leave model.quantize out: only linear layers can be stored in few bits, and convolutional nets are small."
        )
        raise ModelError(Fault(f"no layer of this model can be stored as {kind}", where=where, remedy=remedy))
    for layer in layers:
        # it would repack the weights at the first call without gradients, and round otherwise from then on
        layer.support_avx512bf16_for_cpu = False
    count = sum(weights_of(layer.weight) for layer in layers)
    return (
        f"{len(layers)} matrices with {count:,} weights are stored as {kind}, about {BITS[kind]} bits each; "
        "embeddings, norms and the head keep their precision."
    )


def is_quantized(model: nn.Module) -> bool:
    return any(type(module).__name__ in KINDS for module in model.modules())


def weights_of(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: two share a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def matrix(layer: Any) -> torch.Tensor:
    """The weight of a quantised layer, (out, in) float32."""
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).float()


def dequantized(model: nn.Module) -> nn.Module:
    """A copy on the weights that the few bits stand for, in float32; a LoRA product on one of them is folded in.

    Folding into few bits instead would round the change away: differences of .3 to .4 in logits were seen
    (docs/facts.md).
    """
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        inner = getattr(module, "base_layer", module)
        if type(inner).__name__ in KINDS and not name.endswith(".base_layer"):
            place, _, last = name.rpartition(".")
            setattr(plain.get_submodule(place) if place else plain, last, _whole(module, inner))
    config = getattr(plain, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    for holder in plain.modules():
        for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
            holder.__dict__.pop(mark, None)
    return plain


def _whole(module: Any, inner: Any) -> nn.Linear:
    """An ordinary layer with the weights of a quantised one, and with what LoRA adds to them."""
    weight = matrix(inner)
    for name in getattr(module, "active_adapters", ()):
        if name in module.lora_A:
            weight = _with_product(module, name, weight)
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=inner.bias is not None, device=weight.device)
    whole.weight.data = weight.contiguous()
    if inner.bias is not None:
        whole.bias.data = inner.bias.data.float()
    return whole.requires_grad_(False)


def _with_product(module: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """W + s B A; with a magnitude m (DoRA) its rows have length m; a start (A0, B0) is taken off."""
    scale = module.scaling[name]
    changed = weight + scale * module.lora_B[name].weight.float() @ module.lora_A[name].weight.float()
    if hasattr(module, "start_A"):
        changed = changed - scale * module.start_B.float() @ module.start_A.float()
    if name in getattr(module, "lora_magnitude_vector", {}):
        length = module.lora_magnitude_vector[name].weight.float().reshape(-1, 1)
        changed = changed * length / changed.norm(dim=1, keepdim=True)
    return changed.detach()
