"""Base and tuned on tiny models, side by side, for the tests of the gauges; tuned by a plain loop of the test's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import BAD, GOOD

from tunewright import find
from tunewright.contracts import Baseline, Loaded, Record, Task
from tunewright.data.batches import Examples
from tunewright.engine.evaluate import predict_rows
from tunewright.models import tiny
from tunewright.recipe import ModelSpec
from tunewright.runs.evidence.sides import Sides

MOODS = ("bad", "good")


def mood_rows(n: int, seed: int = 0, name: str = "row") -> list[Record]:
    """Five words of one mood among letters, and the mood."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        label = MOODS[i % 2]
        words = rng.choices(BAD if label == "bad" else GOOD, k=5) + rng.sample("abcdefghijklmnop", rng.randint(2, 9))
        rng.shuffle(words)
        where = f"{name}:{i + 1}"
        talk = [{"role": "user", "content": " ".join(words[:5])}, {"role": "assistant", "content": f"very {label}"}]
        rows.append(
            {"row": where, "where": where, "extra": {}, "text": " ".join(words), "label": label, "conversation": talk}
        )
    return rows


def step(task: Task, loaded: Loaded, rows: Sequence[Record], names: Callable[[str], bool], steps: int, rate: float):
    """Train what `names` says of the loaded model on all rows at once."""
    model = loaded.model
    chosen = [p for name, p in model.named_parameters() if names(name)]
    assert chosen
    optimizer = torch.optim.Adam(chosen, lr=rate)
    batch = task.collate([task.encode(r, loaded) for r in rows])
    for _ in range(steps):
        optimizer.zero_grad()
        (task.loss(model, batch, loaded).totals["cross_entropy"] / task.weights(batch)["cross_entropy"]).backward()
        optimizer.step()


def sides(
    task_name: str,
    checkpoint: Path,
    tune: Callable[[Task, Loaded], None] = lambda task, loaded: None,
    *,
    test: Sequence[Record] | None = None,
    training: Sequence[Record] = (),
    labels: Sequence[str] = MOODS,
    **more: Any,
) -> Sides:
    """Both sides of one tiny checkpoint; `tune` changes the loaded model in place."""
    spec = ModelSpec(str(checkpoint))
    task = find.find("tasks", task_name, Task)()
    labels = labels if any(f.kind == "label" for f in task.fields.values()) else ()
    torch.manual_seed(0)
    start = task.load(spec, labels)
    torch.manual_seed(0)
    loaded = task.load(spec, labels)
    tune(task, loaded)
    rows = mood_rows(60, seed=99, name="test") if test is None else list(test)

    def answers(model: Any, of: Loaded) -> list[Any]:
        return predict_rows(task, model, of, Examples(rows, lambda r: task.encode(r, of)), batch_size=32)

    before, after = answers(start.model, start), answers(loaded.model, loaded)
    given: dict[str, Any] = {
        "task": task, "loaded": loaded, "tuned": loaded.model, "base": start.model, "plain": lambda: loaded.model,
        "baseline": Baseline("base", "the base", lambda _: before), "training": training, "validation": (),
        "test": rows, "before": before, "after": after, "margin": 0.02, "group": None, "seed": 0,
    }  # fmt: skip
    return Sides(**(given | more))


def classifier(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A tiny encoder whose checkpoint has a head for the moods, untrained: so the base answers, at random."""
    import transformers

    tiny.text_encoder(folder)
    names = dict(enumerate(MOODS))
    settings = transformers.AutoConfig.from_pretrained(folder).to_dict() | config
    settings |= {"id2label": names, "label2id": {v: k for k, v in names.items()}, "num_labels": 2}
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings))
    model.save_pretrained(folder)
    return folder
