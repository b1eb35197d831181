"""Virtual tokens: trained vectors that stand before every sequence, wrapped and saved through peft in PEFT's format.

What prefix and prompt tuning have in common. Knows peft, tokenizers and modules by structure; no task, no method, no
family. What plain peft 0.21 gets wrong about places is put right by two hooks, which a result's card carries as well.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.contracts import Loaded
from tunewright.errors import Fault, MethodError
from tunewright.models import peft_adapters
from tunewright.models.layout import max_positions, speaks_words
from tunewright.models.places import own_head
from tunewright.models.surgery import freeze, stores_half

LEAST_ROOM = 8  # tokens of a text that must still fit beside the virtual ones
INSTEAD = "Use method=lora, method=head or method=full."
# What peft raises, from various depths, where a model has no place for virtual tokens.
UNFIT = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, NotImplementedError)


# --------------------------------------------------------------------- wrapping
def reserve(loaded: Loaded, count: int, where: str) -> None:
    """Leave room for `count` virtual tokens: the tokenizer's own limit says from here on what still fits.

    They take positions as real tokens do, and a table of learned positions ends. May be called more than once.
    Raises MethodError where too little is left, or where there are no tokens.
    """
    if loaded.layout.embedding is None or not hasattr(loaded.processor, "model_max_length"):
        raise MethodError(Fault("this model reads no tokens that others could stand before", where, remedy=INSTEAD))
    limit = max_positions(loaded.model)
    if limit is None:
        return
    if limit - count < LEAST_ROOM:
        problem = f"{count} virtual tokens leave {max(0, limit - count)} of the model's {limit} places for a text"
        remedy = f"Lower num_virtual_tokens. {INSTEAD}"
        raise MethodError(Fault(problem, where, "num_virtual_tokens", f"at most {limit - LEAST_ROOM}", remedy=remedy))
    if loaded.processor.model_max_length > limit - count:
        loaded.processor.model_max_length = limit - count
        loaded.notes.append(
            f"{count} of the model's {limit} places go to virtual tokens; a text may have {limit - count} tokens."
        )


def wrap(model: nn.Module, loaded: Loaded, kind: str, count: int, where: str, **options: Any) -> nn.Module:
    """The frozen model behind `count` virtual tokens, its fresh head trainable. kind: the name of a peft config.

    Raises MethodError where peft cannot put them before this model.
    """
    import peft

    reserve(loaded, count, where)
    shape: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if shape.is_encoder_decoder:
        raise MethodError(
            Fault("this model has an encoder and a decoder", where, expected="one of them", remedy=INSTEAD)
        )
    head = loaded.layout.head
    words = head is not None and speaks_words(model, head)
    freeze(model)
    try:
        config = getattr(peft, kind)(
            task_type="CAUSAL_LM" if words else "SEQ_CLS", num_virtual_tokens=count,
            modules_to_save=list(own_head(model, loaded)) or None,
            token_dim=shape.hidden_size, num_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads, **options,
        )  # fmt: skip
        adapted = peft_adapters.put_on(model, config, loaded)
    except UNFIT as error:
        raise unfit(where, error) from error
    put_right(adapted)
    return adapted


def trained(model: nn.Module) -> nn.Module:
    """peft's module that makes the virtual tokens."""
    encoders: Any = model.prompt_encoder
    return encoders[model.active_adapter]  # type: ignore[no-any-return]


def unfit(where: str, error: Exception) -> MethodError:
    """peft's reason as a MethodError with a way out."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return MethodError(Fault("virtual tokens cannot be put before this model", where, got=reason, remedy=INSTEAD))


@torch.no_grad()
def require_effect(model: nn.Module, loaded: Loaded, where: str) -> None:
    """Try it on three tokens: other virtual tokens must give other answers, and padding must not change any.

    Some attentions take no keys from outside, and a head that reads the last token finds it only where it sees ids.
    Raises MethodError.
    """
    ids = torch.tensor([word_ids(loaded, 3, torch.Generator().manual_seed(0))])
    pad = loaded.processor.pad_token_id
    padded = torch.cat([ids, torch.full((1, 2), ids[0, 0].item() if pad is None else pad)], dim=1)
    weights = {p: p.clone() for p in trained(model).parameters()}
    model.eval()
    try:
        own = _logits(model, ids, 3)
        beside = _logits(model, padded, 3)
        for weight in weights:
            weight.add_(1.0)
        other = _logits(model, ids, 3)
    except UNFIT as error:
        raise unfit(where, error) from error
    for weight, value in weights.items():
        weight.copy_(value)
    if torch.equal(own, other):
        raise unfit(where, ValueError("its attention leaves them out: they change no answer"))
    if (own - beside).abs().max() > 0.05 * own.abs().max():  # rounding in bf16 stays below a hundredth
        raise unfit(where, ValueError("its head reads the last token, and behind them takes padding for one"))


def _logits(model: nn.Module, ids: Tensor, real: int) -> Tensor:
    """Logits of the first `real` tokens, or of the row where there is one answer a row."""
    ids = ids.to(next(model.parameters()).device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < real).long().unsqueeze(0)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=stores_half(model)):
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, :real].float() if logits.ndim == 3 else logits.float()


# --------------------------------------------------------------- what they begin as
def word_ids(loaded: Loaded, count: int, rng: torch.Generator | None = None) -> list[int]:
    """Ids of `count` ordinary words, drawn at random: tokens whose text the tokenizer reads back as just them.

    That leaves out markers, pieces of words and unused places. Repeated where the vocabulary has fewer.
    """
    tokenizer, special = loaded.processor, set(loaded.processor.all_special_ids)
    rows = _table(loaded.model, loaded).num_embeddings
    order = [i for i in torch.randperm(min(len(tokenizer), rows), generator=rng).tolist() if i not in special]
    whole = (i for i in order if tokenizer(tokenizer.decode([i]), add_special_tokens=False)["input_ids"] == [i])
    return _repeated(list(islice(whole, count)) or order[:count], count)


def text_ids(loaded: Loaded, text: str, count: int, where: str) -> list[int]:
    """The tokens of a text, repeated or cut to `count`; `loaded.notes` says so. Raises MethodError if it has none."""
    found = loaded.processor(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not found:
        raise MethodError(Fault("the text has no token", where, "init_text", "a text", repr(text)))
    how = "repeated" if len(found) < count else "cut"
    told = "" if len(found) == count else f", {how} to {count}"
    loaded.notes.append(f"The virtual tokens begin as the {len(found)} tokens of init_text{told}.")
    return _repeated(found, count)


def _repeated(ids: list[int], count: int) -> list[int]:
    return (ids * (-(-count // len(ids))))[:count]


@torch.no_grad()
def embedded(model: nn.Module, loaded: Loaded, ids: list[int]) -> Tensor:
    """What the word table gives for these ids, scaled as the model scales it. (n, D) float32"""
    table = _table(model, loaded)
    return table(torch.tensor(ids, device=table.weight.device)).float()  # type: ignore[no-any-return]


def _table(model: nn.Module, loaded: Loaded) -> nn.Embedding:
    table = model.get_submodule(loaded.layout.embedding or "")
    assert isinstance(table, nn.Embedding)
    return table


# ------------------------------------------------------------------ using, saving
def text_only(model, args, inputs, output):  # type: ignore[no-untyped-def]
    # logits of the text alone: peft also returns those of the virtual tokens before it
    ids = inputs["input_ids"] if "input_ids" in inputs else args[0]
    output["logits"] = output["logits"][:, -ids.shape[1] :]


def count_places(base, args, inputs):  # type: ignore[no-untyped-def]
    # padding on the left takes no position: peft forgets that, and answers would depend on the batch
    mask, rows = inputs.get("attention_mask"), inputs.get("inputs_embeds")
    rows = inputs.get("input_ids") if rows is None else rows
    if inputs.get("position_ids") is None and rows is not None and mask is not None and mask.ndim == 2:
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -rows.shape[1] :]
    return args, inputs


def needs_hooks(model: nn.Module) -> bool:
    """Whether peft lays the virtual tokens among the words of a language model, where they take places of its own."""
    config: Any = model.active_peft_config
    return str(getattr(config.task_type, "value", config.task_type)) == "CAUSAL_LM" and (
        str(getattr(config.peft_type, "value", config.peft_type)) == "PROMPT_TUNING"
    )


def put_right(model: nn.Module) -> None:
    """The hooks, where they are needed. They travel with copies and stand in no state dict."""
    if not needs_hooks(model):
        return
    warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
    model.register_forward_hook(text_only, with_kwargs=True)
    base: Any = model.base_model
    if "position_ids" in inspect.signature(base.forward).parameters:
        base.register_forward_pre_hook(count_places, with_kwargs=True)


def opening(base: nn.Module, hooked: bool) -> list[str]:
    """Lines that open the saved adapter with plain peft, and make it answer as here."""
    lines = ["from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "model").eval()']
    if not hooked:
        return lines
    for function in (text_only, count_places):
        source = inspect.getsource(function).replace("  # type: ignore[no-untyped-def]", "")
        lines += source.rstrip().splitlines()
    lines.append("model.register_forward_hook(text_only, with_kwargs=True)")
    if "position_ids" in inspect.signature(base.forward).parameters:
        lines.append("base.register_forward_pre_hook(count_places, with_kwargs=True)")
    return lines


def groups(model: nn.Module, rate: float, head_ratio: float, weight_decay: float) -> list[dict[str, Any]]:
    """Virtual tokens at their high rate, undecayed: zero is no neutral place for them; the head at its own rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    virtual = [(n, p) for n, p in named if n.startswith("prompt_encoder.")]
    head = [(n, p) for n, p in named if not n.startswith("prompt_encoder.")]
    slow = rate * head_ratio
    return [
        {"params": virtual, "lr": rate, "weight_decay": 0.0},
        {"params": [(n, p) for n, p in head if p.ndim > 1], "lr": slow, "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in head if p.ndim <= 1], "lr": slow, "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def without(model: nn.Module) -> Iterator[nn.Module]:
    """The base again, its own head included. peft's own switch forgets the head, and breaks on a classifier."""
    from peft.utils import ModulesToSaveWrapper

    heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    for head in heads:
        head.enable_adapters(False)
    try:
        yield model.base_model  # type: ignore[misc]
    finally:
        for head in heads:
            head.enable_adapters(True)


def reopen(loaded: Loaded, folder: Path, count: int, where: str) -> nn.Module:
    """A saved adapter, on its base again."""
    reserve(loaded, count, where)
    adapted = peft_adapters.reopen(loaded, folder)
    put_right(adapted)
    return adapted
