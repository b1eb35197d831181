"""What a causal language model writes: greedy answers to many prompts, the same as one by one, and drawn texts.

Knows transformers' `generate` and token ids; no messages and no task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models.layout import max_positions, speaks_words


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], max_new_tokens: int, ends: Sequence[int] = ()
) -> list[str]:
    """The text that follows each prompt, up to its end token. prompts: (T,) int64 each, T >= 1."""
    found = generate_ids(model, tokenizer, prompts, max_new_tokens, ends)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]


@torch.inference_mode()
def generate_ids(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], max_new_tokens: int, ends: Sequence[int] = ()
) -> list[list[int]]:
    """New ids of each prompt, its end token included where it came; without one as many as asked and as have room.

    Prompts are padded on the left, so that all answers begin at the same place; transformers counts positions from the
    mask. The model's own generation settings (temperature, penalties) play no part: the same prompt, the same answer.
    """
    rooms = [room(model, tokenizer, len(prompt), max_new_tokens) for prompt in prompts]
    found: dict[int, list[int]] = {}
    for most in sorted(set(rooms)):  # one, unless a prompt nearly fills the model
        chosen = [i for i, own in enumerate(rooms) if own == most]
        stops = list(ends) or [tokenizer.eos_token_id]
        answers = _together(model, tokenizer, [prompts[i] for i in chosen], most, stops)
        found |= dict(zip(chosen, answers, strict=True))
    return [found[i] for i in range(len(prompts))]


def room(model: nn.Module, tokenizer: Any, length: int, most: int) -> int:
    """How many new tokens, up to `most`, a prompt of this length leaves places for. Beyond them a table of positions
    ends, and rotations are none that the model ever saw."""
    limit = min(max_positions(model) or length + most, tokenizer.model_max_length)
    return max(1, min(most, limit - length))


def _together(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], max_new_tokens: int, stops: Sequence[int]
) -> list[list[int]]:
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=list(stops),
        use_cache=True, repetition_penalty=1.0, no_repeat_ngram_size=0,
    )  # fmt: skip
    out = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    found = []
    for row in out[:, longest:].tolist():
        end = next((place for place, i in enumerate(row) if i in stops), len(row) - 1)
        found.append(row[: end + 1])  # behind the first end token stands padding only
    return found


@torch.inference_mode()
def sample_ids(model: nn.Module, start: int, count: int, length: int, seed: int, ends: Sequence[int]) -> list[Tensor]:
    """Texts that a model draws from an empty prompt at temperature 1, nothing held back: up to `length` new ids each.

    start: the token a document begins with, which every sample keeps. The same seed, the same texts.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1, max_new_tokens=length, use_cache=True,
        pad_token_id=ends[0] if ends else start, eos_token_id=list(ends) or None, repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )  # fmt: skip
    prompts = torch.full((count, 1), start, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=settings
        )
    found = []
    for row in out.cpu():
        new = row[1:].tolist()
        end = next((place for place, i in enumerate(new) if i in ends), len(new) - 1)
        found.append(row[: end + 2])
    return found


def writes(model: nn.Module, head: str | None, tokenizer: Any) -> bool:
    """Whether it is a causal language model: its head speaks the vocabulary, and no token sees what comes after it."""
    two_parts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if head is None or two_parts or not hasattr(tokenizer, "decode"):
        return False
    return speaks_words(model, head) and not looks_ahead(model)


def looks_ahead(model: nn.Module) -> bool:
    """Whether a token sees what comes after it, as in an encoder opened as a decoder: its loss would mean nothing."""
    device = next(model.parameters()).device
    was = model.training
    model.eval()
    with torch.inference_mode():
        one, two = (model(torch.tensor([ids], device=device)).logits[0, :2] for ids in ([1, 2, 3, 4], [1, 2, 4, 3]))
    model.train(was)
    return not torch.allclose(one.float(), two.float(), atol=1e-3, rtol=1e-3)
