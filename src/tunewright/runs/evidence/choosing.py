"""The packaged questions put to a model. Knows items and language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tunewright.models.choices import end_logprobs
from tunewright.runs.evidence.bases import asking


def chosen_ends(model: nn.Module, tokenizer: Any, items: Sequence[dict[str, Any]]) -> list[str]:
    """The end that a model finds likeliest for each item; of equals the first in alphabetical order."""
    ends = [sorted([item["right"], *item["wrong"]]) for item in items]  # by content: the right one has no own place
    pairs = [(item["prompt"], end) for item, some in zip(items, ends, strict=True) for end in some]
    with asking(model):
        values = iter(end_logprobs(model, tokenizer, pairs))
    return [max(((next(values), -i, end) for i, end in enumerate(some)))[2] for some in ends]
