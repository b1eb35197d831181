"""Log-probabilities of given labels under a model's logits; every loss over classes or tokens comes through here.

Knows no model: takes logits. One place, so that the engine can later chunk, pack and skip unlabelled positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # the field's mark for "no label here"


def label_logprob(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """Log-probability of each label.

    logits: (..., C) float, before softmax.   labels: (...) int64; where it is `ignore` the result is 0.
    Returns (...) float32, natural log. Computed in float32: bf16 keeps 8 bits, too few for a sum of exponentials.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit")
    labelled = labels != ignore
    index = labels.masked_fill(~labelled, 0).unsqueeze(-1)
    logprob = torch.log_softmax(logits.float(), dim=-1).gather(-1, index).squeeze(-1)
    return logprob.masked_fill(~labelled, 0.0)
