"""The `merge` verb: one run folded into a plain model, or several runs of one base made into one model; each proven.

Several runs are combined on their full weight changes: every run is folded first. The mean of two LoRA's factors A and
of their factors B is not the mean of the products B A, so factors are never averaged. Knows run folders and contracts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunewright.contracts import Metric, Record
from tunewright.data import inspection, records
from tunewright.data.batches import Examples
from tunewright.engine.evaluate import overall, predict_rows, score_rows
from tunewright.errors import DataError, Fault, RunError
from tunewright.models.load import weights_digest
from tunewright.models.weights import in_common, put, weights
from tunewright.recipe import ModelSpec
from tunewright.rundir import RunDir
from tunewright.runs import checking, equality, folding
from tunewright.runs.prediction import Predictor, base_of, labels_of
from tunewright.uses.merged_run import record
from tunewright.uses.mixing import Mixture, Say, Way, Weights, best_base_share, greedy_soup


@dataclass
class Ground:
    """What all runs share, and the rows that none of them trained on."""

    prepared: checking.Prepared  # the first run's recipe
    spec: ModelSpec
    test: list[Record]
    validation: list[Record]
    notes: list[str] = field(default_factory=list)


def merge(
    folders: Sequence[Path],
    out: Path | None = None,
    way: Way | None = None,
    *,
    validation: Path | None = None,
    tolerance: float | None = None,
    base: str | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Merge runs into `out`, a folder like a run's with a plain transformers model; what was done, and its proof.

    validation: rows with answers, for what is chosen; else `data.validation` of the first run.
    base: where the base lies now, if it was moved.
    Raises RunError if the runs do not fit together, VerificationError, leaving nothing at `out`, if the proof fails.
    """
    way = way or Way()
    runs = [RunDir.open(folder) for folder in folders]
    alone = len(runs) == 1 and way.how is None and way.base_share is None
    out = out or runs[0].path.with_name(f"{runs[0].path.name}-{'merged' if alone else way.how or 'linear'}")
    faults = [*way.faults(len(runs)), *_unfit(runs)]
    if out.exists():
        faults.append(Fault("is there already", where=str(out), remedy="Choose another folder: --out FOLDER."))
    if faults:
        raise RunError(faults)
    ground = _ground(runs, way, validation, base)
    for note in ground.notes:
        say(note)
    with folding.all_or_nothing(out) as folder:
        model = folder / "model"
        if alone:
            _, facts = folding.fold_into(runs[0], model, base=base, tolerance=tolerance, say=say)
            facts["sources"] = [_source(runs[0])]
        else:
            facts = _combined(runs, way, ground, model, base=base, tolerance=tolerance, say=say)
        facts = {"base": folding.origin_of(runs[0]), "notes": ground.notes, **facts}
        evidence = record(folder, out.name, runs, ground.prepared, ground.spec, ground.test, facts)
    return {"folder": str(out), **facts, "verdict": evidence["verdict"], "measures": evidence["measures"]}


# ------------------------------------------------------------------ what they share
def _unfit(runs: Sequence[RunDir]) -> list[Fault]:
    """Why these runs cannot be one model: another base, task or labels; nothing trained yet."""
    if unfinished := [run for run in runs if not run.finished]:
        return [Fault("not finished", where=str(run.path), remedy="`train` continues it.") for run in unfinished]
    found = []
    for run in runs if len(runs) > 1 else ():
        if (run.path / "merge.json").is_file() and len(run.read_json("merge.json")["sources"]) > 1:
            found.append(Fault("is several runs merged already", where=str(run.path), remedy="Name its runs instead."))
    first = _kind(runs[0])
    for run in runs[1:]:
        for what, own in _kind(run).items():
            if own != first[what]:
                problem = f"not the same {what} as {runs[0].path}"
                found.append(Fault(problem, where=str(run.path), expected=_short(first[what]), got=_short(own)))
    return found


def _kind(run: RunDir) -> dict[str, Any]:
    recipe, model = run.recipe(), run.path / "model"
    base = folding.origin_of(run)["sha256"]
    facts = {"base": f"SHA-256 {base}", "task": recipe.task.name, "labels": labels_of(model)}
    return facts | {"quantised base": recipe.model.quantize}


def _short(value: Any) -> str:
    return str(value)[:60]


def _source(run: RunDir, **facts: Any) -> dict[str, Any]:
    return {"run": run.path.name, "sha256": weights_digest(run.path / "model"), **facts}


def _ground(runs: Sequence[RunDir], way: Way, validation: Path | None, base: str | None) -> Ground:
    """The first run's rows, less those that another run trained on: nothing is measured or chosen on them."""
    recipe = runs[0].recipe()
    spec = base_of(recipe, runs[0].path / "model", base, "merging starts from the base, and compares with it")
    prepared = checking.prepare(replace(recipe, model=spec))
    task, data = prepared.task, prepared.data
    key = partial(inspection.content_key, fields=task.fields)
    trained = {key(r) for r in data.train}
    for run in runs[1:]:
        trained |= {key(r) for r in equality.held_out(run.recipe(), run.path).train}
    ground = Ground(prepared, spec, [r for r in data.test if key(r) not in trained], [])
    if lost := len(data.test) - len(ground.test):
        ground.notes.append(
            f"{lost} of {len(data.test)} held-out rows are left out: another of these runs trained on them."
        )
    if not ground.test:
        remedy = (
            "Name a test file in the recipes (data.test), or give them one seed, so that they hold out the same rows."
        )
        raise RunError(
            Fault("no held-out row is left that none of these runs trained on", str(runs[0].path), remedy=remedy)
        )
    if way.chooses:
        given = _read(validation, prepared) if validation else data.validation
        seen = trained | {key(r) for r in data.test}
        ground.validation = [r for r in given if key(r) not in seen]
        if lost := len(given) - len(ground.validation):
            ground.notes.append(f"{lost} of {len(given)} validation rows are left out: they are training or test rows.")
        if not ground.validation:
            problem = "something is chosen by its score, and there are no rows to choose on"
            remedy = "Give rows that are neither training nor test rows: --validation FILE, or data.validation."
            raise RunError(Fault(problem, where=f"--how {way.how}" if way.how else "--base-share", remedy=remedy))
    return ground


def _read(file: Path, prepared: checking.Prepared) -> list[Record]:
    fields = prepared.task.fields
    rows, _, faults = records.read_inputs(file, fields, columns=prepared.recipe.data.columns, required=tuple(fields))
    label = next((name for name, f in fields.items() if f.kind == "label"), "")
    if label and not faults:
        faults = [fault for fault, _ in inspection.unknown_labels(rows, label, prepared.data.labels)]
    if faults:
        raise DataError(faults)
    return rows


# ------------------------------------------------------------------------ combining
@dataclass
class Trial:
    """A model to put weights into, and the rows on which it is scored."""

    predictor: Predictor
    rows: Sequence[Record]

    def put(self, weights: Weights) -> Predictor:
        """The model with these weights."""
        put(self.predictor.model, weights)
        return self.predictor

    def score(self, weights: Weights) -> float:
        """The first metric on the rows, turned so that more is better."""
        predictor, task = self.put(weights), self.predictor.task
        examples = Examples(self.rows, lambda r: task.encode(r, predictor.loaded))
        size = predictor.recipe.train.per_device_eval_batch_size
        found = predict_rows(task, predictor.model, predictor.loaded, examples, batch_size=size, validating=True)
        score = overall(task, score_rows(task, found, self.rows))[task.metrics[0].name]
        return score if task.metrics[0].higher_is_better else -score


def _combined(
    runs: Sequence[RunDir],
    way: Way,
    ground: Ground,
    folder: Path,
    *,
    base: str | None,
    tolerance: float | None,
    say: Say,
) -> dict[str, Any]:
    """Several runs as one model in `folder`, reloaded and proven; the facts for merge.json."""
    allowed = ground.prepared.recipe.export.tolerance if tolerance is None else tolerance
    mixture, model, folds = _mixture(runs, ground, base, allowed, say)
    names = [run.path.name for run in runs]
    trial, metric = Trial(model, ground.validation), ground.prepared.task.metrics[0]
    chosen, share, choices = _choose(mixture, way, trial, metric, names, say)
    plain = trial.put(mixture.mix(way, chosen, share))
    folding.write_model(plain, folder, folding.origin_of(runs[0]))
    own = equality.answers_of(plain, equality.spread(ground.test))
    figures = equality.reloaded(folder, runs[0].path / "recipe.yaml", own, plain, allowed)
    equality.require_equal(figures, str(folder))
    how = way.told([names[i] for i in chosen], share)
    say(how)
    say(f"Saved, and equal in a new process. {equality.told(figures)}")
    sources = [_source(run, used=i in chosen, fold=folds[i]) for i, run in enumerate(runs)]
    return {"how": how, **way.settled(share), "sources": sources, "figures": figures, **choices}


def _choose(
    mixture: Mixture, way: Way, trial: Trial, metric: Metric, names: Sequence[str], say: Say
) -> tuple[list[int], float, dict[str, Any]]:
    """Which runs, which share of the base, and every score that was looked at, in the metric's own sign."""
    found: dict[str, Any] = {}
    chosen, sign = list(range(len(names))), 1 if metric.higher_is_better else -1
    if way.how == "soup":
        chosen, tried = greedy_soup(mixture, way, trial.score)
        say(f"Greedy soup by {metric.name} on {len(trial.rows)} validation rows:")
        found["soup"] = []
        for step in tried:
            name, alone, together = names[step["model"]], sign * step["alone"], sign * step["with_it"]
            say(f"  {name}: alone {alone:.4f}, with it {together:.4f}, {'kept' if step['kept'] else 'left out'}")
            found["soup"].append({"run": name, "alone": alone, "with_it": together, "kept": step["kept"]})
    if way.base_share != "auto":
        return chosen, way.base_share or 0.0, found
    share, scores = best_base_share(mixture, way, chosen, trial.score)
    say(f"Share of the base by {metric.name} on {len(trial.rows)} validation rows:")
    for one, score in scores.items():
        say(f"  {one:g}: {sign * score:.4f}{'  chosen' if one == share else ''}")
    return chosen, share, found | {"base_shares": {f"{one:g}": sign * score for one, score in scores.items()}}


def _mixture(
    runs: Sequence[RunDir], ground: Ground, base: str | None, tolerance: float, say: Say
) -> tuple[Mixture, Predictor, list[dict[str, Any]]]:
    """Every run folded and proven: all weights, a model of their shape, and the figures of each proof."""
    found: list[Weights] = []
    folds: list[dict[str, Any]] = []
    models: list[Predictor] = []
    for run in runs:
        folded = folding.fold(run, base)
        other = equality.answers_of(folded.predictor, folded.own.records)
        figures = equality.differences(folded.own.logits, equality.score_of(folded.own), other)
        figures["tolerance"] = tolerance
        equality.require_equal(figures, str(run.path))
        say(f"{run.path.name}: {folded.how} {equality.told(figures)}")
        folds.append(figures)
        found.append(weights(folded.predictor.model))
        models = models or [folded.predictor]  # the others are let go
        _same_shapes(runs[0], found[0], run, found[-1])
    loaded = ground.prepared.task.load(ground.spec, models[0].loaded.labels)
    start = weights(folding.in_float32(loaded.model))
    known = in_common(start, found[0], loaded.fresh)
    mixture = Mixture(
        base={name: start[name] for name in known},
        models=found,
        buffers={name for name, _ in models[0].model.named_buffers()} & set(found[0]),
        digests=[weights_digest(run.path / "model") for run in runs],
    )
    for note in _remarks(mixture, runs, loaded.fresh):
        ground.notes.append(note)
        say(note)
    return mixture, models[0], folds


def _remarks(mixture: Mixture, runs: Sequence[RunDir], fresh: Sequence[str]) -> list[str]:
    """What a person must know of weights that are averaged because they have no common start."""
    said, names, seeds = [], ", ".join(fresh), sorted({run.recipe().seed for run in runs})
    if fresh:
        said.append(f"New in these runs, so without a value in the base: {names}. Averaged as they are.")
    if fresh and len(seeds) > 1:
        said.append(
            f"Warning: {names} began from random values that differ from run to run (seeds "
            f"{', '.join(map(str, seeds))}); the mean of such heads may be worse than each. Train with one seed."
        )
    if mixture.buffers:
        said.append(f"{len(mixture.buffers)} statistics of normalisation layers are averaged, not computed anew.")
    return said


def _same_shapes(first: RunDir, one: Weights, run: RunDir, two: Weights) -> None:
    shapes = [{name: tuple(value.shape) for name, value in weights.items()} for weights in (one, two)]
    other = sorted(name for name in one.keys() | two.keys() if shapes[0].get(name) != shapes[1].get(name))
    if other:
        problem = f"its weights do not have the names and shapes of those of {first.path} ({other[0]} for one)"
        raise RunError(Fault(problem, where=str(run.path)))
