"""Attention of packed documents, each by itself: no mask of a row's square, no arithmetic between documents.

A model is told to use it under a name of its own among transformers' attention functions. Where a row is packed, the
"mask" that travels through its layers is the list of documents (so that a recomputed layer sees it too); everything
else, padding and generation among it, goes to transformers' own function. Knows no model class. Does not know chunked
attention, sinks, soft caps and biases of position: models with those keep their own way.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models import small_attention

NAME = "sdpa_by_document"
KNOWN = ("full_attention", "sliding_attention")  # kinds of layers whose documents may be taken apart
FOREIGN = ("softcap", "s_aux", "position_bias")  # what the plain function would have to do besides


def attend_by_document(model: nn.Module) -> bool:
    """Make this model attend document by document in packed rows; False, and nothing changed, where it cannot."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or ()
    if getattr(text, "_attn_implementation", None) == NAME:
        return True
    if getattr(text, "_attn_implementation", None) != "sdpa" or not set(kinds) <= set(KNOWN):
        return False
    if getattr(text, "attention_chunk_size", None):
        return False
    _register()
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return bool(text._attn_implementation == NAME)


def attend_in_rows(model: nn.Module) -> None:
    """Undo `attend_by_document`."""
    model.set_attn_implementation("sdpa")  # type: ignore[operator]


# -------------------------------------------------------------- by plain products
SMALL = 2**22  # scores of all heads of a call, 16 MB, up to which they are made one after the other


def attend_by_plain_products() -> None:
    """From now on, in this process, small float32 attention on a CPU is two products and a softmax.

    torch's own kernel calls many small products, for which oneDNN takes eight times as long; large ones gain.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", _by_plain_products)


def _by_plain_products(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *given: Any, **named: Any
) -> tuple[Tensor, None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.device.type != "cpu" or query.dtype != torch.float32 or query[..., 0].numel() * key.shape[2] > SMALL:
        return sdpa_attention_forward(module, query, key, value, mask, *given, **named)
    is_causal = named.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not given and _is_plain(query, key, value, mask, is_causal, named):
        dropout, scale = named.get("dropout", 0.0), named.get("scaling")
        return small_attention.attend(query, key, value, mask, is_causal, scale, dropout), None
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_attention_forward(module, query, key, value, mask, *given, **named)


def _is_plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, named: dict[str, Any]
) -> bool:
    """Whether a call asks for nothing but a softmax of masked scores."""
    if any(named.get(name) is not None for name in (*FOREIGN, "cache")) or named.get("output_attentions"):
        return False
    return small_attention.suits(query, key, value, mask, is_causal, named.get("dropout", 0.0))


def keep_from_compilers() -> None:
    """From now on, in this process, compilers step around our attention: it asks masks what they hold.

    Compiled, it would break into many small graphs, and draw other places to drop than it does by itself.
    """
    from transformers import AttentionInterface

    functions = AttentionInterface()
    for name in ("sdpa", NAME):
        found = functions.get(name)
        if getattr(found, "__module__", "").startswith(__package__) and not hasattr(found, "_torchdynamo_disable"):
            AttentionInterface.register(name, torch.compiler.disable(found))


def own_sdpa() -> Any:
    """What transformers calls "sdpa" in this process."""
    from transformers import AttentionInterface

    return AttentionInterface()["sdpa"]


# ------------------------------------------------------------------- by document
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _documents)


def _documents(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, *, mask_function: Any,
    attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, use_vmap: bool = False, **rest: Any,
) -> Tensor | None:  # fmt: skip
    """(documents, 3) int32, as no mask is: row, first place, place after the last; or transformers' own mask.

    A document begins where a token must not look at the token before it.
    """
    from transformers.masking_utils import sdpa_mask

    plain = allow_is_causal_skip or use_vmap or attention_mask is not None
    if plain or q_length != kv_length or int(q_offset) or int(kv_offset):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, **rest,
        )  # fmt: skip
    rows = torch.arange(batch_size)[:, None]
    places = torch.arange(1, q_length)[None]
    device = rest.get("device", "cpu")
    looks = mask_function(rows.to(device), torch.zeros_like(rows).to(device), places.to(device), places.to(device) - 1)
    begins = torch.ones(batch_size, q_length, dtype=torch.bool)
    begins[:, 1:] = ~looks.cpu()
    row, first = begins.nonzero(as_tuple=True)
    ends = torch.cat([first[1:], first.new_tensor([q_length])])
    return torch.stack([row, first, torch.where(ends > first, ends, q_length)], dim=-1).int()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """(B, T, H, D) from query (B, H, T, D), key and value (B, K, T, D)."""
    sdpa = own_sdpa()
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa(module, query, key, value, attention_mask, **named)  # type: ignore[no-any-return]
    if foreign := [name for name in FOREIGN if named.get(name) is not None]:
        raise ValueError(f"{', '.join(foreign)} cannot be had document by document")
    documents = attention_mask.tolist()
    window = named.get("sliding_window")
    kind = value.dtype
    with _wide(query.device.type):
        parts = [_split(tensor.float() if query.device.type == "cpu" else tensor, documents)
                 for tensor in (query, key, value)]  # fmt: skip
        found = [
            sdpa(
                module, q, k, v, _banded(q.shape[2], window, q.device),
                dropout=named.get("dropout", 0.0), scaling=named.get("scaling"), is_causal=True,
            )[0]
            for q, k, v in zip(*parts, strict=True)
        ]  # fmt: skip
    if len(query) == 1:
        return torch.cat(found, dim=1).to(kind), None
    lines = [torch.cat([one for one, (row, _, _) in zip(found, documents, strict=True) if row == i], dim=1)
             for i in range(len(query))]  # fmt: skip
    return torch.cat(lines).to(kind), None


def _wide(device: str) -> contextlib.AbstractContextManager[object]:
    """On a CPU attention is computed in float32: its backward in bf16 takes twice the time (docs/performance.md)."""
    return torch.autocast("cpu", enabled=False) if device == "cpu" else contextlib.nullcontext()


def _split(tensor: Tensor, documents: list[list[int]]) -> list[Tensor]:
    """One (1, H, length, D) a document. `split` alone: a slice's gradient would be as large as the whole tensor."""
    found: list[Tensor] = []
    for i, row in enumerate(tensor.split(1)):
        found += row.split([stop - start for r, start, stop in documents if r == i], dim=2)
    return found


def _banded(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(1, 1, T, T), True where a token of a window looks; None where the window holds the whole document."""
    if not window or window >= length:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return ((back >= 0) & (back < window))[None, None]
