"""A base in 4 or 8 bits: `model.quantize: nf4` (Dettmers et al. 2023, arXiv 2305.14314) or `int8` (LLM.int8, 2022).

Through bitsandbytes. Its matrices are stored in few bits and made whole again for every product; what trains stands
beside them. Embeddings, norms and heads keep their precision. Knows bitsandbytes' layers, no method and no task.
"""

from __future__ import annotations

import copy
import importlib
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
# at every product: that int8 rounds its inputs by way of float16, which its note says once
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


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
        bnb_4bit_compute_dtype=torch.bfloat16 if device == "cuda" and _has_bf16() else torch.float32,
    )  # fmt: skip


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


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


# After the base is loaded: without these a CPU with bf16 units repacks 4 bits and rounds otherwise (or fails, where a
# width is no multiple of 32), and int8 rounds what flows in.
SETTLING_LINES = [
    "for layer in base.modules():",
    '    if hasattr(layer, "support_avx512bf16_for_cpu"):',
    "        layer.support_avx512bf16_for_cpu = False",
    '    if type(layer).__name__ == "Linear8bitLt":  # in training mode int8 rounds weights alone, and no inputs',
    '        layer.register_forward_pre_hook(lambda layer, given: setattr(layer, "training", True))',
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
        # it would repack the weights at the first call without gradients, round otherwise from then on (.01 in logits)
        # and lose the gradient of its input: validation between two steps would end the training
        layer.support_avx512bf16_for_cpu = False
        if kind == "int8":
            layer.register_forward_pre_hook(_round_weights_alone)
            layer.register_forward_hook(_stand_frozen)
    count = sum(weights_of(layer.weight) for layer in layers)
    inputs = " On this GPU products round their inputs to 8 bits too." * (kind == "int8" and torch.cuda.is_available())
    return f"{len(layers)} matrices with {count:,} weights are stored as {kind}, about {BITS[kind]} bits each.{inputs}"


def _round_weights_alone(layer: nn.Linear, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """On a CPU int8 multiplies exactly in training mode. In eval mode it rounds its inputs to 8 bits too, and treats
    columns with values above 6 apart: an answer would depend on the other rows of its batch."""
    layer.training = True
    # for inputs of another dtype, as under autocast, it would round its own bias for good
    return given if layer.bias is None else (given[0].to(layer.bias.dtype), *given[1:])


def _stand_frozen(layer: nn.Module, given: Any, output: torch.Tensor) -> None:
    layer.training = False


def is_quantized(model: nn.Module) -> bool:
    return any(type(module).__name__ in KINDS for module in model.modules())


def weights_of(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: two share a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def matrix(layer: Any) -> torch.Tensor:
    """The weight of a linear layer, quantised or not, Conv1D too: (out, in) float32."""
    if type(layer).__name__ not in KINDS:
        weight = layer.weight.detach().float()
        return weight.T if type(layer).__name__ == "Conv1D" else weight
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None)).float()


def dequantized(model: nn.Module) -> nn.Module:
    """A copy on the weights that the few bits stand for, in float32; what peft put around them stays around them.

    Folding goes onto this copy. Into few bits it would round the change away: .3 to .4 in logits (docs/facts.md).
    """
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if type(layer).__name__ in KINDS and not hasattr(layer, "base_layer"):
            plain.set_submodule(name, _whole(layer))
    for layer in plain.modules():
        if type(layer).__module__.startswith("peft.tuners.") and type(layer).__name__ in KINDS:
            _wrap_plainly(layer)
        for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
            layer.__dict__.pop(mark, None)
    config = getattr(plain, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    return plain


def _whole(layer: Any) -> nn.Module:
    """The layer of the checkpoint's own kind, linear or Conv1D, with the weights of a quantised one."""
    weight = matrix(layer)
    (num_out, num_in), source = weight.shape, getattr(layer, "source_cls", nn.Linear)
    if source.__name__ == "Conv1D":  # GPT-2's: as a linear layer it would be saved transposed
        whole, weight = source(num_out, num_in), weight.T
        whole.bias = None if layer.bias is None else whole.bias
    else:
        whole = nn.Linear(num_in, num_out, bias=layer.bias is not None)
    whole.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if layer.bias is not None:
        whole.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return whole


def _wrap_plainly(wrapper: Any) -> None:
    """peft's layer around a quantised one becomes its layer around a plain one: `bnb.py` keeps the former, `layer.py`
    beside it the latter, and both hold the same parts."""
    sibling = importlib.import_module(type(wrapper).__module__.replace(".bnb", ".layer"))
    wrapper.__class__ = sibling.Linear
    wrapper.fan_in_fan_out = wrapper.is_target_conv_1d_layer = type(wrapper.base_layer).__name__ == "Conv1D"
