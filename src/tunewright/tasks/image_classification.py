"""Image classification: one picture in, one of a fixed set of labels out.

Pictures are read with PIL and prepared by the checkpoint's own image processor (its PIL form: no torchvision).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, nn

from tunewright.contracts import Baseline, Batch, Example, Field, Loaded, Loss, Prediction, Record, Task
from tunewright.metrics.classification import ACCURACY, LOG_LOSS, MACRO_F1, score_class
from tunewright.models import classifier
from tunewright.models.load import open_processor
from tunewright.recipe import ModelSpec


@dataclass(frozen=True)
class ImageClassification(Task):
    flip: bool = False  # mirror left and right at random while training; wrong for digits, text and signs
    class_weights: Literal["balanced"] | dict[str, float] | None = None  # for rare labels: weight of each in the loss

    fields: ClassVar[dict[str, Field]] = {
        "image": Field("path of the picture", "image", ("file", "path", "file_name", "filename", "image_path", "img")),
        "label": Field("the class", "label", ("labels", "class", "category", "target")),
    }
    metrics: ClassVar = (ACCURACY, MACRO_F1, LOG_LOSS)
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    pipeline: ClassVar[str] = "image-classification"

    def load(self, spec: ModelSpec, labels: Sequence[str] = ()) -> Loaded:
        processor = open_processor("AutoImageProcessor", spec, backend="pil")
        return classifier.open_classifier(self.auto_class, spec, processor, labels)

    def fit_to(self, records: Sequence[Record]) -> Task:
        return dataclasses.replace(self, class_weights=classifier.fitted_weights(self.class_weights, records))

    def encode(self, record: Record, loaded: Loaded, *, target: bool = True) -> Example:
        from PIL import Image, ImageOps

        with Image.open(record["image"]) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")  # cameras store rotation beside the pixels
        pixels = loaded.processor(images=upright, return_tensors="pt")["pixel_values"][0]
        example = {"row": record["row"], "pixel_values": pixels}
        weights = self.class_weights if isinstance(self.class_weights, dict) else None
        return example | (classifier.class_target(record, loaded, weights) if target else {})

    def show(self, example: Example, loaded: Loaded) -> str:
        channels, height, width = example["pixel_values"].shape
        low, high = example["pixel_values"].aminmax()
        text = f"{example['row']}: {width} x {height} pixels, {channels} channels, values {low:.2f} to {high:.2f}"
        return text + (f"  ->  {loaded.labels[example['label']]}" if "label" in example else "")

    def augment(self, example: Example, rng: Generator) -> Example:
        if self.flip and torch.rand((), generator=rng) < 0.5:
            return example | {"pixel_values": example["pixel_values"].flip(-1)}
        return example

    @property
    def augments(self) -> bool:
        return self.flip

    def collate(self, examples: Sequence[Example]) -> Batch:
        return {"pixel_values": torch.stack([e["pixel_values"] for e in examples])} | classifier.class_targets(examples)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"cross_entropy": float(batch["weights"].sum())}

    def loss(self, model: nn.Module, batch: Batch, loaded: Loaded) -> Loss:
        return classifier.class_loss(model(pixel_values=batch["pixel_values"]).logits, batch)

    def predict(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Prediction]:
        return classifier.class_predictions(model(pixel_values=batch["pixel_values"]).logits, loaded.labels)

    def score(self, prediction: Prediction, record: Record) -> dict[str, Any]:
        return score_class(prediction, record["label"])

    def baseline(self, spec: ModelSpec, loaded: Loaded, records: Sequence[Record]) -> Baseline | None:
        """The base's own head where it already knows every label by name ("ants" is its "ant"); else the majority."""
        if not loaded.fresh:
            return None
        own = classifier.own_labels(spec)
        matches = [[i for i, name in enumerate(own) if _same_word(label, name)] for label in loaded.labels]
        if not all(matches):
            return classifier.majority(records, loaded.labels)
        return self._own_head(spec, matches, loaded.labels)

    def _own_head(self, spec: ModelSpec, matches: list[list[int]], labels: Sequence[str]) -> Baseline:
        base = self.load(dataclasses.replace(spec, dtype="float32"))  # there is no autocast here
        base.model.eval()

        def predict(rows: Sequence[Record]) -> list[Prediction]:
            answers: list[Prediction] = []
            for start in range(0, len(rows), 32):
                batch = self.collate([self.encode(r, base, target=False) for r in rows[start : start + 32]])
                with torch.inference_mode():
                    logits = base.model(pixel_values=batch["pixel_values"]).logits.float()
                ours = torch.stack([logits[:, ids].logsumexp(dim=-1) for ids in matches], dim=-1)
                answers += classifier.class_predictions(ours, labels)
            return answers

        text = f"the base unchanged: its own head, of whose {len(base.labels)} labels those that name yours compete"
        return Baseline("zero-shot", text, predict)


def _same_word(label: str, name: str) -> bool:
    """Whether a base's label ("ant, emmet, pismire") names the user's ("ants"): whole words, plural or not."""
    wanted = label.lower().replace("_", " ").strip()
    forms = {wanted, wanted.removesuffix("s"), wanted.removesuffix("es")}
    return bool(forms & {part.strip().lower() for part in re.split(r"[,;]", name)})
