"""Base and tuned answer the same held-out rows; what follows is written down. Knows tasks only as contracts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from tunewright.contracts import Baseline, Loaded, Prediction, Record, Task
from tunewright.data.batches import Examples
from tunewright.engine.evaluate import predict_rows, score_rows
from tunewright.recipe import ModelSpec
from tunewright.runs.evidence import measures
from tunewright.runs.evidence.verdict import advice, verdict

FORGOT = "what it forgot (no rows of other skills were scored: evaluate.general)"
GAUGED = "messy input, groups of rows and confidence"  # until the gauges have run; see gauging.py
OTHER_SEEDS = "other seeds (this is one training run; `tunewright train RECIPE --seeds 3` trains with three)"
NOT_MEASURED = [FORGOT, OTHER_SEEDS, GAUGED]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Answers:
    """Base and tuned on the same rows."""

    records: Sequence[Record]
    base: Sequence[Prediction]
    tuned: Sequence[Prediction]


def base_answers(
    task: Task, spec: ModelSpec, loaded: Loaded, training: Sequence[Record], records: Sequence[Record], batch_size: int
) -> tuple[Baseline, list[Prediction]]:
    """What stood there before training, on these rows: a named baseline, or the base model itself."""
    baseline = baseline_of(task, spec, loaded, training, batch_size)
    return baseline, baseline.predict(records)


def baseline_of(task: Task, spec: ModelSpec, loaded: Loaded, training: Sequence[Record], batch_size: int) -> Baseline:
    """What stood there before training, ready to answer any rows."""
    baseline = task.baseline(spec, loaded, training)
    if baseline is not None:
        return baseline
    return Baseline("base", "the base model itself, unchanged", BaseModel(task, spec, loaded.labels, batch_size))


@dataclass(frozen=True)
class BaseModel:
    """The base itself as a baseline: opened when first asked, and kept for the next question."""

    task: Task
    spec: ModelSpec
    labels: tuple[str, ...]
    batch_size: int

    @cached_property
    def loaded(self) -> Loaded:
        return self.task.load(self.spec, self.labels)

    def __call__(self, records: Sequence[Record]) -> list[Prediction]:
        base = self.loaded
        examples = Examples(records, lambda r: self.task.encode(r, base))
        return predict_rows(self.task, base.model, base, examples, batch_size=self.batch_size)


def tuned_answers(
    task: Task, model: nn.Module, loaded: Loaded, records: Sequence[Record], batch_size: int, progress: Progress | None
) -> list[Prediction]:
    """The tuned model's answers."""
    examples = Examples(records, lambda r: task.encode(r, loaded))
    return predict_rows(task, model, loaded, examples, batch_size=batch_size, progress=progress)


def weigh(
    task: Task,
    labels: Sequence[str],
    records: Sequence[Record],
    baseline: Baseline,
    base: Sequence[Prediction],
    tuned: Sequence[Prediction],
    *,
    margin: float,
    group: str | None,
    seed: int,
    overlap: int = 0,
    general: Mapping[str, Answers] | None = None,
) -> dict[str, Any]:
    """evidence.json without its cost: verdict, measures, flips, baseline, confusion, advice.

    general: by name, what should be kept; only the first metric speaks in the verdict, all of them are reported.
    """
    before, after = score_rows(task, base, records), score_rows(task, tuned, records)
    groups = [str(r["extra"].get(group)) for r in records] if group else None
    found = []
    for metric in task.metrics if records else ():
        pair = [s[metric.name] for s in before], [s[metric.name] for s in after]
        found.append(measures.measure(metric, *pair, groups, baseline.name, seed=seed))
    flips = measures.flips(task, records, list(zip(base, before, strict=True)), list(zip(tuned, after, strict=True)))
    kept = [_general(task, name, answers, baseline, seed) for name, answers in (general or {}).items()]
    measures.correct([*found, *(m for part in kept for m in part)], task.metrics[0].name)
    not_measured = [line for line in NOT_MEASURED if not (kept and line == FORGOT)]
    result = verdict(found[0] if found else None, flips, margin, not_measured, overlap, [m[0] for m in kept])
    evidence: dict[str, Any] = {"verdict": result, "measures": found + [m for part in kept for m in part]}
    if flips is not None and records:
        evidence["flips"] = flips
    elif samples := measures.samples(task, records, base, tuned):
        evidence["samples"] = samples
    confusion = measures.confusion(labels, records, base, tuned)
    if confusion is not None:
        evidence["confusion"] = confusion
    evidence["baseline"] = {"name": baseline.name, "text": baseline.text}
    evidence["advice"] = advice(result, flips)
    return evidence


def _general(task: Task, name: str, answers: Answers, baseline: Baseline, seed: int) -> list[dict[str, Any]]:
    """The task's metrics on one set of rows of other skills."""
    before, after = (score_rows(task, side, answers.records) for side in (answers.base, answers.tuned))
    found = []
    for metric in task.metrics:
        pair = [s[metric.name] for s in before], [s[metric.name] for s in after]
        found.append(measures.measure(metric, *pair, None, baseline.name, "general", seed) | {"set": name})
    return found


def write_scores(folder: Path, task: Task, parts: Sequence[tuple[str, Answers]]) -> None:
    """scores.parquet: one line a row and metric; metrics that pool rows have no number of their own.

    parts: (split, answers); "test" and "general".
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = []
    for split, a in parts:
        before, after = score_rows(task, a.base, a.records), score_rows(task, a.tuned, a.records)
        lines += [
            {"row": r["row"], "split": split, "metric": m.name, "base": float(b[m.name]), "tuned": float(t[m.name])}
            for m in task.metrics
            if m.pool is None
            for r, b, t in zip(a.records, before, after, strict=True)
        ]
    types = [
        ("row", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("base", pa.float64()),
        ("tuned", pa.float64()),
    ]
    pq.write_table(pa.Table.from_pylist(lines, schema=pa.schema(types)), folder / "scores.parquet")
