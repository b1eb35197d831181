"""Instruction tuning: a conversation in, the assistant's next answer out.

The base's chat template turns messages into tokens, a plain one where it has none; only what the assistant says is
learnt, its end token always. How rows are written down is data/chat.py's matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewright.contracts import Batch, Example, Field, Loaded, Loss, Metric, Prediction, Record, Task
from tunewright.data import chat
from tunewright.data.rows import chosen
from tunewright.errors import DataError, Fault, ModelError
from tunewright.metrics.text import EXACT_MATCH, ROUGE_L, exact_match, rouge_l
from tunewright.models import template
from tunewright.models.generation import generate, looks_ahead
from tunewright.models.layout import max_positions
from tunewright.models.load import open_checkpoint, open_processor
from tunewright.models.logprob import IGNORE, causal_logprob
from tunewright.recipe import ModelSpec

LONGEST = 1024  # tokens; longer conversations cost with the square and need the recipe's word
NAMED = 5  # rows that a note names


@dataclass(frozen=True)
class Sft(Task):
    max_length: int | None = None  # tokens; None: the model's limit, at most 1024
    train_on: Literal["completions", "all"] = "completions"  # what the assistant says, or every token
    on_long: Literal["drop", "cut"] = "drop"  # rows longer than that: an answer without its end teaches not to end
    max_new_tokens: int = 64  # of the answers generated for the evidence

    fields: ClassVar[dict[str, Field]] = {"conversation": Field("what is asked and answered", "conversation")}
    metrics: ClassVar = (Metric("loss", higher_is_better=False, proportion=False), ROUGE_L, EXACT_MATCH)
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline: ClassVar[str] = "text-generation"
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 8:
            raise ValueError(f"max_length is {self.max_length}: a question with its answer needs at least 8 tokens")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: an answer needs at least 1")

    def load(self, spec: ModelSpec, labels: Sequence[str] = ()) -> Loaded:
        tokenizer = open_processor("AutoTokenizer", spec)
        notes = template.prepare(tokenizer)
        loaded = open_checkpoint(self.auto_class, spec, tokenizer)
        if loaded.fresh or looks_ahead(loaded.model):
            problem = "it has no head for words" if loaded.fresh else "its tokens see what comes after them"
            remedy = "Take a decoder (Llama, Qwen, GPT ...)."
            raise ModelError(Fault(f"no causal language model: {problem}", f"model {spec.checkpoint}", remedy=remedy))
        ends = template.end_ids(tokenizer, loaded.model)
        loaded.helpers["ends"] = ends
        loaded.model.generation_config.eos_token_id = ends  # type: ignore[union-attr]  # so that others stop there too
        loaded.notes += [*notes, f"Answers end with {' or '.join(tokenizer.convert_ids_to_tokens(ends))}."]
        if not template.closes(tokenizer, ends):
            loaded.notes.append(
                f"The chat template closes no answer: {tokenizer.eos_token} is put behind each, so that the model "
                "learns to end; a server that renders earlier turns by this template leaves it out there."
            )
        loaded.notes.append(f"Conversations may have {self._limit(loaded)} tokens.")
        return loaded

    def rows(self, loaded: Loaded, records: Sequence[Record]) -> Sequence[Record]:
        """Without those that do not fit, unless the recipe wants them cut; both are counted in the notes."""
        long, spelled, fitting = [], [], []
        for place, record in enumerate(records):
            example = self.encode(record, loaded)
            if example["control"]:
                spelled.append(example["row"])
            if example["truncated"]:
                long.append(example["row"])
            else:
                fitting.append(place)
        if spelled:
            loaded.notes.append(f"Control tokens in the text of {_counted(spelled, records)}: read as plain text.")
        if not long:
            return records
        limit = self._limit(loaded)
        if self.on_long == "cut":
            loaded.notes.append(f"Answers cut at {limit} tokens, their end lost: {_counted(long, records)}.")
            return records
        loaded.notes.append(f"Left out, longer than {limit} tokens (task.on_long): {_counted(long, records)}.")
        if len(long) == len(records):
            remedy = "Raise task.max_length if the model allows it, or set task.on_long=cut."
            raise DataError(Fault(f"no training row fits into {limit} tokens", "task.max_length", remedy=remedy))
        return chosen(records, fitting)

    # -------------------------------------------------------------- one row
    def encode(self, record: Record, loaded: Loaded, *, target: bool = True) -> Example:
        messages = record["conversation"]
        asked = chat.asked(messages)
        prompt = [i for p in self._pieces(record, asked, loaded, prompt=True) for i in p.ids]
        example: Example = {"row": record["row"], "prompt_ids": torch.tensor(self._shortened(prompt, loaded))}
        if not target:
            return example | {"length": len(example["prompt_ids"])}
        pieces = self._pieces(record, messages[: len(asked) + 1], loaded)
        ids = torch.tensor([i for p in pieces for i in p.ids])
        learnt = torch.tensor([p.answer or self.train_on == "all" for p in pieces for _ in p.ids])
        labels = ids.masked_fill(~learnt, IGNORE)
        start = self._cut_before(len(prompt), len(ids), loaded)
        keep = torch.cat([torch.arange(min(1, start)), torch.arange(min(1, start) + start, len(ids))])
        keep = keep[: self._limit(loaded)]
        contents = [m["content"] for m in messages]
        return example | {
            "input_ids": ids[keep],
            "labels": labels[keep],
            "length": len(keep),
            "truncated": len(ids) - len(keep),
            "control": template.holds_control(loaded.processor, contents),
        }

    def _pieces(
        self, record: Record, messages: Sequence[chat.Message], loaded: Loaded, prompt: bool = False
    ) -> list[template.Piece]:
        from jinja2 import TemplateError

        try:
            return template.pieces(loaded.processor, messages, loaded.helpers["ends"], prompt)
        except TemplateError as error:
            problem = f"the base's chat template refuses these turns: {error}"
            got = ", ".join(m["role"] for m in messages)
            raise DataError(Fault(problem, str(record["where"]), "conversation", got=got)) from error

    def _shortened(self, prompt: list[int], loaded: Loaded) -> list[int]:
        """A prompt that leaves room for an answer: its beginning is cut, the start token kept."""
        limit = self._limit(loaded)
        room = limit - min(self.max_new_tokens, limit // 2)
        prompt = prompt or [loaded.processor.eos_token_id]  # nothing was asked: what a new document begins with
        return prompt if len(prompt) <= room else prompt[:1] + prompt[len(prompt) - room + 1 :]

    def _cut_before(self, prompt: int, whole: int, loaded: Loaded) -> int:
        """How many tokens of too long a row go at its beginning: a prompt keeps half of the room at the least."""
        limit = self._limit(loaded)
        return max(0, min(whole - limit, prompt - limit // 2))

    def show(self, example: Example, loaded: Loaded) -> str:
        """The row as the model sees it; what is learnt stands between « and »."""
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        text, start = "", 0
        for end in range(1, len(ids) + 1):
            learnt = labels[start] != IGNORE
            if end == len(ids) or (labels[end] != IGNORE) != learnt:
                part = loaded.processor.decode(ids[start:end])
                text, start = text + (f"«{part}»" if learnt else part), end
        return text + (f" (cut: {example['truncated']} tokens do not fit)" if example["truncated"] else "")

    # ------------------------------------------------------------- batches
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch: Batch = {"row": [e["row"] for e in examples], "prompt_ids": [e["prompt_ids"] for e in examples]}
        if not all("labels" in e for e in examples):
            return batch
        longest = max(e["length"] for e in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
        for i, example in enumerate(examples):
            ids[i, : example["length"]] = example["input_ids"]
            mask[i, : example["length"]] = 1
            labels[i, : example["length"]] = example["labels"]
        return batch | {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"cross_entropy": float((batch["labels"][:, 1:] != IGNORE).sum())}

    def loss(self, model: nn.Module, batch: Batch, loaded: Loaded) -> Loss:
        return Loss({"cross_entropy": -causal_logprob(model, batch).sum()})

    def predict(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Prediction]:
        """A greedy answer to each prompt; beside it what the expected answer costs, where it is known."""
        costs = self.validate(model, batch, loaded)
        texts = generate(model, loaded.processor, batch["prompt_ids"], self.max_new_tokens, loaded.helpers["ends"])
        return [{"text": text} | cost for text, cost in zip(texts, costs, strict=True)]

    def validate(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Prediction]:
        if "labels" not in batch:
            return [{} for _ in batch["row"]]
        costs: Tensor = -causal_logprob(model, batch).sum(dim=-1)
        counts = (batch["labels"][:, 1:] != IGNORE).sum(dim=-1)
        return [
            {"loss": cost / count, "tokens": count} for cost, count in zip(costs.tolist(), counts.tolist(), strict=True)
        ]

    # -------------------------------------------------------------- scores
    def truth(self, record: Record) -> str | None:
        answers = [m["content"] for m in record["conversation"] if m["role"] == "assistant"]
        return answers[-1] if answers else None

    def score(self, prediction: Prediction, record: Record) -> dict[str, Any]:
        scores = {"loss": prediction["loss"]} if "loss" in prediction else {}
        if "text" in prediction and (truth := self.truth(record)) is not None:
            scores |= {"rougeL": rouge_l(prediction["text"], truth)}
            scores |= {"exact_match": exact_match(prediction["text"], truth)}
        return scores

    def _limit(self, loaded: Loaded) -> int:
        own = min(max_positions(loaded.model) or LONGEST, loaded.processor.model_max_length)
        return min(own, self.max_length or LONGEST)


def _counted(rows: Sequence[str], records: Sequence[Record]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"{len(rows)} of {len(records)} training rows ({', '.join(rows[:NAMED])}{more})"
