"""Log-probabilities of given labels under a model's logits; every loss over classes or tokens comes through here.

Knows no model class. Logits are made only where a label is, a few rows at a time (label_logits.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models.label_logits import caught, find_head, score_in_pieces

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


def label_slopes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`label_logprob` of labels that are all there, (n,), and its slopes by the logits, (n, V): one-hot - softmax.

    What the exponentials add up to is read off the likeliest class, whose probability never vanishes.
    """
    shares, index = torch.softmax(logits.float(), dim=-1), labels.unsqueeze(-1)
    above = logits.gather(-1, index).float() - logits.amax(-1, keepdim=True).float()
    scores = above + shares.amax(-1, keepdim=True).log()
    slopes = shares.neg_()
    return scores.squeeze(-1), slopes.scatter_add_(-1, index, torch.ones_like(scores))


def kl_divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned): how much likelier the base finds its own words than the tuned model does, in nats.

    base, tuned: (..., V) logits, before softmax. Returns (...) float32, from 0 on; exactly 0 for equal logits.
    """
    before, after = torch.log_softmax(base.float(), dim=-1), torch.log_softmax(tuned.float(), dim=-1)
    # what the base holds for impossible counts nothing: 0 times minus infinity would be nan
    return torch.where(before.isneginf(), 0.0, before.exp() * (before - after)).sum(-1)


def causal_logprob(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Log-probability of every labelled token given the tokens before it in its own document.

    batch: input_ids (B, T); labels (B, T), -100 where nothing is learnt; attention_mask (B, T) where rows are padded,
    or position_ids (B, T) that begin anew with every document where several are packed into one row.
    Returns (B, T - 1) float32: place t belongs to labels[:, t + 1]; 0 where there is no label.
    The first token of a packed document has no context: its label must be -100 (engine/packing.py sees to it).
    """
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    labels, head = batch["labels"][:, 1:], find_head(model)
    hidden = caught(model, head.module, inputs) if head.module is not None else None
    if hidden is None:
        return label_logprob(model(**inputs, use_cache=False).logits[:, :-1], labels)
    places = (labels.reshape(-1) != IGNORE).nonzero().squeeze(-1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, places)
    found = score_in_pieces(head, rows, labels.reshape(-1).index_select(0, places), label_logprob, label_slopes)
    return found.new_zeros(labels.numel()).index_copy(0, places, found).view_as(labels)
