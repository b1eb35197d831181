"""Text classification: one text in, one of a fixed set of labels out.

Uses the checkpoint's own sequence-classification class, so that plain transformers opens the result.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tunewright.contracts import Baseline, Batch, Example, Field, Loaded, Loss, Prediction, Record, Task
from tunewright.metrics.classification import ACCURACY, LOG_LOSS, MACRO_F1, score_class
from tunewright.models import classifier, template, vocabulary
from tunewright.models.layout import max_positions
from tunewright.models.load import open_processor, resolve
from tunewright.recipe import ModelSpec

LONGEST = 512  # a text encoder's usual limit; longer inputs cost with the square and need the recipe's word
ZERO_SHOT_LONGEST = 256  # tokens of a text that its likeness to a label's name is taken from
CHOOSING_ROWS = 300  # training rows on which zero-shot and majority are compared


@dataclass(frozen=True)
class TextClassification(Task):
    max_length: int | None = None  # tokens; None: the model's limit, at most 512. Longer texts are cut, and counted
    class_weights: Literal["balanced"] | dict[str, float] | None = None  # for rare labels: weight of each in the loss

    fields: ClassVar[dict[str, Field]] = {
        "text": Field(
            "the input", "text", ("sentence", "message", "content", "body", "review", "ticket", "description")
        ),
        "label": Field("the class", "label", ("labels", "class", "category", "target", "sentiment", "tag")),
    }
    metrics: ClassVar = (ACCURACY, MACRO_F1, LOG_LOSS)
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline: ClassVar[str] = "text-classification"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 3:
            raise ValueError(f"max_length is {self.max_length}: a text needs at least 3 tokens, markers included")

    def load(self, spec: ModelSpec, labels: Sequence[str] = ()) -> Loaded:
        tokenizer = open_processor("AutoTokenizer", spec)
        loaded = classifier.open_classifier(self.auto_class, spec, tokenizer, labels)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
            loaded.notes.append("The tokenizer has no padding token: its end token pads, hidden by the mask.")
        loaded.model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]  # decoders find the last token by it
        limit = self._limit(loaded)
        loaded.notes.append(f"Texts are cut at {limit} tokens.")
        return loaded

    def fit_to(self, records: Sequence[Record]) -> Task:
        return dataclasses.replace(self, class_weights=classifier.fitted_weights(self.class_weights, records))

    def rows(self, loaded: Loaded, records: Sequence[Record]) -> Sequence[Record]:
        """All of them. Texts that spell a control token are counted, and read as transformers reads them in serving."""
        control = template.control_names(loaded.processor)
        spelled = [r["row"] for r in records if template.spells(control, [r["text"]])]
        if spelled:
            which = f"{len(spelled)} of {len(records)} training rows ({spelled[0]} for one)"
            loaded.notes.append(f"Control tokens are spelt by {which}: they steer here as they do in a pipeline.")
        return records

    def encode(self, record: Record, loaded: Loaded, *, target: bool = True) -> Example:
        limit = self._limit(loaded)
        ids = loaded.processor(record["text"], truncation=True, max_length=limit)["input_ids"]
        whole = len(ids)
        if whole >= limit:
            whole = len(loaded.processor(record["text"], truncation=False, verbose=False)["input_ids"])
        example = {
            "row": record["row"],
            "input_ids": torch.tensor(ids),
            "length": len(ids),
            "truncated": whole - len(ids),
        }
        weights = self.class_weights if isinstance(self.class_weights, dict) else None
        return example | (classifier.class_target(record, loaded, weights) if target else {})

    def show(self, example: Example, loaded: Loaded) -> str:
        text = loaded.processor.decode(example["input_ids"])
        return text + (f"  ->  {loaded.labels[example['label']]}" if "label" in example else "")

    def collate(self, examples: Sequence[Example]) -> Batch:
        longest = max(e["length"] for e in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, example in enumerate(examples):
            ids[i, : example["length"]] = example["input_ids"]
            mask[i, : example["length"]] = 1
        return {"input_ids": ids, "attention_mask": mask} | classifier.class_targets(examples)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"cross_entropy": float(batch["weights"].sum())}

    def loss(self, model: nn.Module, batch: Batch, loaded: Loaded) -> Loss:
        return classifier.class_loss(self._logits(model, batch, loaded), batch)

    def predict(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Prediction]:
        return classifier.class_predictions(self._logits(model, batch, loaded), loaded.labels)

    def score(self, prediction: Prediction, record: Record) -> dict[str, Any]:
        return score_class(prediction, record["label"])

    def baseline(self, spec: ModelSpec, loaded: Loaded, records: Sequence[Record]) -> Baseline | None:
        """Zero-shot by the likeness of text and label name, or the majority: whichever does better on training rows."""
        if not loaded.fresh:
            return None
        majority = classifier.majority(records, loaded.labels)
        zero_shot = self._zero_shot(spec, loaded.labels)
        if zero_shot is None:
            return majority
        rows = heapq.nsmallest(CHOOSING_ROWS, records, key=lambda r: r["row"])
        right = [
            sum(p["label"] == r["label"] for p, r in zip(b.predict(rows), rows, strict=True))
            for b in (zero_shot, majority)
        ]
        return zero_shot if right[0] > right[1] else majority

    def _zero_shot(self, spec: ModelSpec, labels: Sequence[str]) -> Baseline | None:
        """None where it cannot work: labels that are no words, or a base that is no encoder."""
        from transformers import AutoModel, AutoTokenizer

        if not all(any(c.isalpha() for c in name) for name in labels):
            return None
        folder, _ = resolve(spec)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        trunk = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        if getattr(trunk.config, "is_decoder", False) or tokenizer.mask_token is None:
            return None
        vocabulary.resize(trunk, tokenizer)
        room = min(max_positions(trunk) or ZERO_SHOT_LONGEST, tokenizer.model_max_length, ZERO_SHOT_LONGEST)

        def embed(texts: list[str]) -> Tensor:
            """Mean of the last layer over real tokens, length 1. (B, D)"""
            batch = tokenizer(texts, padding=True, truncation=True, max_length=room, return_tensors="pt")
            with torch.inference_mode():
                states = trunk(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

        names = embed([name.replace("_", " ").replace("-", " ") for name in labels])

        def predict(rows: Sequence[Record]) -> list[Prediction]:
            answers: list[Prediction] = []
            for start in range(0, len(rows), 32):
                likeness = embed([r["text"] for r in rows[start : start + 32]]) @ names.T
                answers += classifier.class_predictions(likeness / 0.05, labels)  # a usual temperature of such encoders
            return answers

        text = "the base unchanged: each text gets the label whose name its embedding is most like"
        return Baseline("zero-shot", text, predict)

    def _limit(self, loaded: Loaded) -> int:
        own = min(max_positions(loaded.model) or LONGEST, loaded.processor.model_max_length)
        return min(own, self.max_length or LONGEST)

    def _logits(self, model: nn.Module, batch: Batch, loaded: Loaded) -> Tensor:
        """(B, C). Padding ids are set here, where the tokenizer is known."""
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, loaded.processor.pad_token_id)
        return model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
