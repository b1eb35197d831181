"""Continued pre-training: a language model reads plain text of a new domain and learns to expect it.

Documents longer than the context become windows that share one token, so that every token but the first of a document
is predicted exactly once, in training and in evaluation; what a window cannot see is the text before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Example, Field, Loaded, Loss, Metric, Prediction, Record, Task
from tunewright.data.rows import chosen
from tunewright.errors import DataError, Fault
from tunewright.models.generation import generate
from tunewright.models.layout import max_positions
from tunewright.models.load import open_checkpoint, open_processor
from tunewright.models.logprob import IGNORE, causal_logprob
from tunewright.recipe import ModelSpec

LONGEST = 2048  # tokens of a window where neither recipe nor model says less: attention costs with the square
CONTINUATION = 128  # new tokens that `predict` writes at most
AT_ONCE = 32  # windows scored in one forward pass: a book among the test rows must not fill the memory


def perplexity(pairs: Sequence[Sequence[float]]) -> float:
    """exp of the mean cost of a token over all rows. pairs: (nats a token, tokens) of each row."""
    tokens = sum(n for _, n in pairs)
    return math.exp(sum(loss * n for loss, n in pairs) / tokens) if tokens else math.nan


@dataclass(frozen=True)
class CausalLM(Task):
    max_length: int | None = None  # tokens of a window; None: the model's limit, at most 2048

    fields: ClassVar[dict[str, Field]] = {
        "text": Field("the document", "text", ("content", "document", "body", "story", "passage", "article")),
    }
    metrics: ClassVar = (
        Metric("loss", higher_is_better=False, proportion=False),
        Metric("perplexity", higher_is_better=False, proportion=False, pool=perplexity),
    )
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline: ClassVar[str] = "text-generation"
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}: to predict a token takes at least 2")

    def load(self, spec: ModelSpec, labels: Sequence[str] = ()) -> Loaded:
        loaded = open_checkpoint(self.auto_class, spec, open_processor("AutoTokenizer", spec))
        tokenizer = loaded.processor
        said = [
            f"{before} {token}" if token else f"no {kind} token, as the tokenizer has none"
            for before, kind, token in (
                ("begins with", "start", tokenizer.bos_token),
                ("ends with", "end", tokenizer.eos_token),
            )
        ]
        loaded.notes.append(f"Every document: {', '.join(said)}.")
        limit = self._limit(loaded)
        loaded.notes.append(
            f"Documents longer than {limit} tokens become windows of {limit}, for training and for scores; nothing is "
            "cut off, but a later window does not see the text before it."
        )
        return loaded

    def rows(self, loaded: Loaded, records: Sequence[Record]) -> Sequence[Record]:
        """Windows of long documents as rows of their own: `book.txt:1 part 2 of 7`.

        Documents of a single token are left out: where the tokenizer has no marks, nothing of them is predicted.
        """
        limit = self._limit(loaded)
        kept: list[int] = []
        cut: dict[int, list[Tensor]] = {}
        single: list[str] = []
        for place, record in enumerate(records):
            ids = self._ids(record, loaded)
            if len(ids) < 2:
                single.append(record["row"])
                continue
            kept.append(place)
            if len(ids) > limit and len(parts := windows(torch.tensor(ids), limit)) > 1:
                cut[place] = parts
        if single:
            which = f"{len(single)} of {len(records)} documents ({single[0]} for one)"
            loaded.notes.append(f"Left out, of a single token, so that there is nothing to predict: {which}.")
        if not kept:
            raise DataError(Fault("no document has two tokens, so that one could be predicted", where="data.train"))
        if cut:
            return [row for place in kept for row in _parts(records[place], cut.get(place))]
        return chosen(records, kept) if single else records

    def encode(self, record: Record, loaded: Loaded, *, target: bool = True) -> Example:
        limit = self._limit(loaded)
        if not target:
            whole = self._ids(record, loaded, end=False)
            most = limit - min(CONTINUATION, limit // 2)  # its mark and its end, with room for what follows
            start = whole[: loaded.processor.bos_token_id is not None]
            prompt = torch.tensor(whole if len(whole) <= most else start + whole[len(whole) - most + len(start) :])
            cut = len(whole) - len(prompt)
            return {"row": record["row"], "input_ids": prompt, "limit": limit, "length": len(prompt), "truncated": cut}
        tokens = record["ids"] if "ids" in record else torch.tensor(self._ids(record, loaded))
        return {
            "row": record["row"],
            "input_ids": tokens,
            "labels": tokens.clone(),
            "length": len(tokens),
            "limit": limit,
        }

    def show(self, example: Example, loaded: Loaded) -> str:
        return loaded.processor.decode(example["input_ids"])

    def collate(self, examples: Sequence[Example]) -> Batch:
        """(B, T) windows, padded at the end; `document` (B,) says which example a window belongs to."""
        cut = [windows(e["input_ids"], e["limit"]) for e in examples]
        document = [i for i, parts in enumerate(cut) for _ in parts]
        parts = [part for parts in cut for part in parts]
        longest = max(len(part) for part in parts)
        ids = torch.zeros(len(parts), longest, dtype=torch.int64)  # any token may pad: the mask hides it
        mask = torch.zeros_like(ids)
        for i, part in enumerate(parts):
            ids[i, : len(part)] = part
            mask[i, : len(part)] = 1
        batch: Batch = {"input_ids": ids, "attention_mask": mask, "document": torch.tensor(document)}
        batch["row"] = [examples[i]["row"] for i in document]
        if all("labels" in e for e in examples):
            batch["labels"] = ids.masked_fill(mask == 0, IGNORE)
        return batch

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"cross_entropy": float((batch["labels"][:, 1:] != IGNORE).sum())}

    def loss(self, model: nn.Module, batch: Batch, loaded: Loaded) -> Loss:
        return Loss({"cross_entropy": -causal_logprob(model, batch).sum()})

    def predict(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Prediction]:
        """What each document cost where its end is known; else how the model goes on, word by likeliest word."""
        if "labels" not in batch:
            prompts = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
            return [{"text": text} for text in generate(model, loaded.processor, prompts, CONTINUATION)]
        costs = zip(*(sums.tolist() for sums in self._costs(model, batch)), strict=True)
        return [{"loss": nats / max(tokens, 1.0), "tokens": int(tokens)} for nats, tokens in costs]

    def score(self, prediction: Prediction, record: Record) -> dict[str, Any]:
        return {"loss": prediction["loss"], "perplexity": (prediction["loss"], prediction["tokens"])}

    def _costs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats and predicted tokens of every document, summed over its windows. (documents,) float64 each."""
        nats = torch.zeros(int(batch["document"].max()) + 1, dtype=torch.float64)
        tokens = torch.zeros_like(nats)
        for start in range(0, len(batch["input_ids"]), AT_ONCE):
            names = ("input_ids", "attention_mask", "labels")
            part = {name: batch[name][start : start + AT_ONCE] for name in names}
            document = batch["document"][start : start + AT_ONCE].cpu()
            nats.index_add_(0, document, -causal_logprob(model, part).sum(-1).cpu().double())
            tokens.index_add_(0, document, (part["labels"][:, 1:] != IGNORE).sum(-1).cpu().double())
        return nats, tokens

    def _ids(self, record: Record, loaded: Loaded, *, end: bool = True) -> list[int]:
        """Token ids of a document between its marks. `</s>` in somebody's text stays five letters."""
        tokenizer = loaded.processor
        ids = tokenizer(record["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        after = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
        return [*before, *ids, *after]

    def _limit(self, loaded: Loaded) -> int:
        own = min(max_positions(loaded.model) or LONGEST, loaded.processor.model_max_length)
        return min(own, self.max_length or LONGEST)


def _parts(record: Record, parts: Sequence[Tensor] | None) -> list[Record]:
    if parts is None:
        return [record]
    return [
        record | {"row": f"{record['row']} part {i} of {len(parts)}", "ids": part} for i, part in enumerate(parts, 1)
    ]


def windows(ids: Tensor, limit: int) -> list[Tensor]:
    """(T,) in stretches of at most `limit` tokens. Each begins with the last token of the one before: its first token
    is not predicted, and so nothing is left out and nothing counted twice."""
    starts = range(0, max(1, len(ids) - 1), max(1, limit - 1))
    return [ids[start : start + limit] for start in starts]
