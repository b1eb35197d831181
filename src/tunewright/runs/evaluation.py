"""A finished run scored on another file with its own statistics, or measured where its gauges have not run yet.

Knows run folders and contracts. For another file the run's own test rows are not opened again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunewright.contracts import Record, Task
from tunewright.data import inspection, records
from tunewright.errors import DataError, Fault, RunError, nearest
from tunewright.rundir import RunDir
from tunewright.runs import checking
from tunewright.runs.evidence import gather, gauging
from tunewright.runs.prediction import base_of, is_whole, labels_of, method_of, open_run, task_of
from tunewright.runs.report.card import write_card
from tunewright.runs.report.page import write_report


def evaluate_file(folder: Path, file: Path, base: str | None = None) -> dict[str, Any]:
    """evidence.json's content for the rows of `file`, which must carry labels that the run knows.

    Raises DataError before a model is opened if they do not.
    """
    run = RunDir.open(folder)
    recipe, model = run.recipe(), run.path / "model"
    task = task_of(recipe)
    rows, _, faults = records.read_inputs(file, task.fields, columns=recipe.data.columns, required=tuple(task.fields))
    known = labels_of(model) if (model / "config.json").is_file() else ()
    faults += [
        Fault(
            "a label that the model does not know",
            where=r["where"],
            field="label",
            expected="one of " + ", ".join(known),
            got=repr(r["label"]),
            remedy=nearest(r["label"], known),
        )
        for r in rows
        if known and r.get("label", known[0]) not in known
    ]
    if faults:
        raise DataError(faults)
    predictor = open_run(folder, base)
    loaded = predictor.loaded
    training = _training_rows(run)
    size = recipe.train.per_device_eval_batch_size
    spec = base_of(recipe, model, base, "an evaluation compares with the base")
    baseline, before = gather.base_answers(task, spec, task.load(spec, loaded.labels), training, rows, size)
    after = gather.tuned_answers(task, predictor.model, loaded, rows, size, None)
    return gather.weigh(
        task, loaded.labels, rows, baseline, before, after,
        margin=recipe.evaluate.margin, group=recipe.data.group, seed=recipe.seed,
        overlap=_overlap(task, training, rows),
    )  # fmt: skip


def measure_gauges(folder: Path, base: str | None, say: Callable[[str], None]) -> list[str]:
    """Measure what a finished run's `gauges/` does not hold, and write report and card again.

    The names of what was measured, without what could not be. Raises RunError if the run is not finished or its rows
    have changed.
    """
    run = RunDir.open(folder)
    if not run.finished or not (run.path / "predictions.jsonl").is_file():
        raise RunError(Fault("not finished, so there is nothing to measure on", where=str(run.path)))
    with run.locked():
        recipe, model = run.recipe(), run.path / "model"
        moved = replace(recipe, model=replace(recipe.model, checkpoint=base)) if base else recipe
        prepared, predictor = checking.prepare(moved), open_run(folder, base)
        data, task = prepared.data, predictor.task
        spec = base_of(recipe, model, base, "an evaluation compares with the base")
        # what the base lacks, a finished model no longer shows
        start = task.load(spec, predictor.loaded.labels)
        loaded = replace(predictor.loaded, fresh=start.fresh)
        ground = gauging.Ground(
            run, recipe, task, method_of(recipe), loaded, predictor.model, is_whole(model), spec, data.train,
            data.validation, data.test, prepared.general,
            gather.baseline_of(task, spec, start, data.train, recipe.train.per_device_eval_batch_size),
        )  # fmt: skip
        tried = gauging.measure_missing(ground, say, quick=False, again=True)
        write_report(run.path)
        write_card(run.path)
        found = gauging.read(run)
    return [name for name in tried if "not_run" not in found[name]]


def _training_rows(run: RunDir) -> Sequence[Record]:
    """The rows that the run was trained on, read again: a baseline is made from them, and overlap is looked for."""
    recipe = run.recipe()
    task = task_of(recipe)
    validation = recipe.train.early_stopping_patience is not None
    data, faults = records.load(recipe.data, task.fields, seed=recipe.seed, validation=validation)
    if data is None:
        raise DataError([*faults, Fault("the run's training rows are needed for its baseline", where=str(run.path))])
    return data.train


def _overlap(task: Task, training: Sequence[Record], rows: Sequence[Record]) -> int:
    """How many rows have the same content as a training row."""
    seen = {inspection.content_key(r, task.fields) for r in training}
    return sum(inspection.content_key(r, task.fields) in seen for r in rows)
