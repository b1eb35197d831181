"""Which of several ends does a language model find likeliest? By the log-probability of each after its beginning.

Knows causal language models and tokenizers; not what is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models.logprob import IGNORE, causal_logprob

ROWS = 64  # beginnings with their ends in one forward pass


def end_logprobs(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Log-probability of each end after its beginning, summed over its tokens. pairs: (beginning, end).

    A space stands between them. Called under inference mode; the model is in eval mode.
    """
    rows = [_row(tokenizer, beginning, end) for beginning, end in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    found = [0.0] * len(rows)
    device = next(model.parameters()).device
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        batch = {name: value.to(device) for name, value in _batch([rows[i] for i in chosen]).items()}
        for place, value in zip(chosen, causal_logprob(model, batch).sum(-1).tolist(), strict=True):
            found[place] = value
    return found


def _row(tokenizer: Any, beginning: str, end: str) -> tuple[list[int], int]:
    """Ids of the whole, and where the end begins: at the first token that the beginning alone does not have."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    alone = before + tokenizer(beginning, add_special_tokens=False)["input_ids"]
    whole = before + tokenizer(f"{beginning} {end}", add_special_tokens=False)["input_ids"]
    same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    return whole, max(1, min(same, len(whole) - 1))


def _batch(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, (one, start) in enumerate(rows):
        ids[i, : len(one)] = torch.tensor(one)
        mask[i, : len(one)] = 1
        labels[i, start : len(one)] = ids[i, start : len(one)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
