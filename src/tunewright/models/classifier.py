"""What classifiers of every modality share: opening one with the user's labels, its loss, its predictions.

Knows logits, label names and transformers' config keys; not where the inputs come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tunewright.contracts import Baseline, Batch, Loaded, Loss, Prediction, Record
from tunewright.errors import Fault, ModelError, RecipeError
from tunewright.models.load import open_checkpoint, open_config
from tunewright.models.logprob import label_logprob
from tunewright.recipe import ModelSpec


def open_classifier(auto_class: str, spec: ModelSpec, processor: Any, labels: Sequence[str]) -> Loaded:
    """A classifier for these labels. The base's own head stays where it already speaks exactly them.

    labels: () opens a saved model with the labels it has.
    """
    own = own_labels(spec)
    if labels and set(labels) == set(own):
        labels = own  # the base's order: its head knows ids, not names
    if not labels:
        if not own:
            raise ModelError(Fault("config.json names no labels", where=f"model {spec.checkpoint}"))
        labels = own
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    kind = {"problem_type": "single_label_classification", "num_labels": len(labels), **names}
    loaded = open_checkpoint(auto_class, spec, processor, **kind)
    loaded.labels = tuple(labels)
    if len(own) == len(labels) and tuple(own) != tuple(labels) and not loaded.fresh:
        _renew_head(loaded)  # as many labels, other words: the sizes fit, the meaning does not
    return loaded


def own_labels(spec: ModelSpec) -> tuple[str, ...]:
    """The label names of a checkpoint, () where it has none or only the placeholder LABEL_0."""
    config = open_config(spec)
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    architectures = getattr(config, "architectures", None) or [""]
    is_head = "Classification" in architectures[0]
    return names if is_head and not all(name.startswith("LABEL_") for name in names) else ()


def _renew_head(loaded: Loaded) -> None:
    head = loaded.layout.head
    assert head is not None
    modules = [(name, m) for name, m in loaded.model.named_modules() if name == head or name.startswith(f"{head}.")]
    fresh = []
    for name, module in modules:
        if isinstance(module, torch.nn.Linear):
            module.weight.data.normal_(0.0, 0.02)
            if module.bias is not None:
                module.bias.data.zero_()
            fresh.append(name)
    loaded.fresh = tuple(fresh)
    loaded.notes.append(f"The base's head has as many labels but other names: {', '.join(fresh)} starts anew.")


# ---------------------------------------------------------------- loss and answers
def class_loss(logits: Tensor, batch: Batch) -> Loss:
    """Cross-entropy. logits: (B, C); batch["labels"]: (B,) int64; batch["weights"]: (B,) float32."""
    costs = -label_logprob(logits, batch["labels"]) * batch["weights"]
    return Loss({"cross_entropy": costs.sum()})


def class_targets(examples: Sequence[dict[str, Any]]) -> Batch:
    """Labels (B,) and weights (B,) of examples that have them, and the row ids."""
    batch: Batch = {"row": [e["row"] for e in examples]}
    if all("label" in e for e in examples):
        batch["labels"] = torch.tensor([e["label"] for e in examples])
        batch["weights"] = torch.tensor([e["weight"] for e in examples], dtype=torch.float32)
    return batch


def class_target(record: Record, loaded: Loaded, class_weights: dict[str, float] | None) -> dict[str, Any]:
    """The label's id and its weight in the loss."""
    name = record["label"]
    return {"label": loaded.labels.index(name), "weight": (class_weights or {}).get(name, 1.0)}


def class_predictions(logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
    """logits: (B, C). Each row's label, its probability, and all probabilities by name."""
    predictions = []
    for row in torch.softmax(logits.float(), dim=-1).tolist():
        scores = dict(zip(labels, row, strict=True))
        label = max(scores, key=lambda name: scores[name])
        predictions.append({"label": label, "score": scores[label], "scores": scores})
    return predictions


def fitted_weights(
    given: Literal["balanced"] | dict[str, float] | None, records: Sequence[Record]
) -> dict[str, float] | None:
    """The weights of the loss by label name. Raises RecipeError for labels that the training rows do not have."""
    if given is None or given == "balanced":
        return balanced_weights(records) if given else None
    assert isinstance(given, dict)
    known = sorted({r["label"] for r in records})
    faults = [
        Fault(f'no training row has the label "{name}"', "task.class_weights", "", ", ".join(known), name)
        for name in given
        if name not in known
    ]
    faults += [
        Fault("impossible weight", f"task.class_weights.{name}", "", "more than 0", str(weight))
        for name, weight in given.items()
        if not weight > 0
    ]
    if faults:
        raise RecipeError(faults)
    return given


def balanced_weights(records: Sequence[Record]) -> dict[str, float]:
    """n / (classes x rows of the class), as scikit-learn's "balanced": every class weighs the same in sum."""
    counts = Counter(r["label"] for r in records)
    return {name: len(records) / (len(counts) * n) for name, n in counts.items()}


def majority(records: Sequence[Record], labels: Sequence[str]) -> Baseline:
    """Always the most frequent label of the training rows, with the training shares as scores."""
    counts = Counter(r["label"] for r in records)
    scores = {name: counts[name] / len(records) for name in labels}
    label = max(labels, key=lambda name: counts[name])
    answer: Prediction = {"label": label, "score": scores[label], "scores": scores}
    text = f'always "{label}", the most frequent label of the training rows: the base has no answer of its own'
    return Baseline("majority", text, lambda rows: [dict(answer) for _ in rows])
