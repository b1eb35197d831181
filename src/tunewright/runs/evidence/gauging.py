"""Runs the gauges over base and tuned, one file in `gauges/` each, and keeps what they found in the run's `gauges/`.

Knows gauges by their files alone: a new file there is a new gauge. What one of them cannot measure, or fails at, is
written down with the reason and stops nothing. A gauge may say two things about itself:

PASSES = True    it asks the models anew; `evaluate.quick` leaves it out
ABOUT = "..."    what the report names where it did not run
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from tunewright import find
from tunewright.contracts import Baseline, Loaded, Method, Prediction, Record, Task
from tunewright.data import canaries
from tunewright.data.rows import chosen
from tunewright.engine import distributed
from tunewright.errors import Fault, RunError
from tunewright.recipe import ModelSpec, Recipe
from tunewright.rundir import RunDir, sync
from tunewright.runs.evidence.gather import GAUGED, BaseModel, baseline_of
from tunewright.runs.evidence.sides import NotRun, Sides

Say = Callable[[str], None]
FAILED = "it failed: "
LATER = "`tunewright evaluate RUN --gauges` measures it"


@dataclass(frozen=True)
class Ground:
    """A trained run as a gauge's sides need it: the open model, and the rows it was made and scored with."""

    run: RunDir
    recipe: Recipe
    task: Task
    method: Method
    loaded: Loaded
    tuned: nn.Module
    whole: bool  # `tuned` is plain already
    spec: ModelSpec
    training: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    general: Mapping[str, Sequence[Record]]
    baseline: Baseline | None = None  # where it is open already

    def sides(self, quick: bool) -> Sides:
        """Base and tuned side by side; a base that is a model is opened.

        Raises RunError if predictions.jsonl holds other rows.
        """
        recipe, size = self.recipe, self.recipe.train.per_device_eval_batch_size
        before, after = self._answers()
        baseline = self.baseline or baseline_of(self.task, self.spec, self.loaded, self.training, size)
        opened = baseline.predict.loaded if isinstance(baseline.predict, BaseModel) else None
        folds = self.whole or self.method.folds
        return Sides(
            task=self.task, loaded=self.loaded, tuned=self.tuned, base=opened.model if opened else None,
            plain=self._plain if folds else None, baseline=baseline,
            training=chosen(self.training, [i for i, r in enumerate(self.training) if not canaries.is_planted(r)]),
            planted=[r for r in self.training if canaries.is_planted(r)],
            validation=() if quick else self.validation, test=self.test, before=before, after=after,
            margin=recipe.evaluate.margin, group=recipe.data.group, seed=recipe.seed, batch_size=size,
            trunk=(lambda: opened) if opened else (lambda: self.task.load(self.spec, self.loaded.labels)),
            general=self.general, name=self.run.path.name, groups=recipe.evaluate.groups,
            harness=recipe.evaluate.harness, quick=quick,
        )  # fmt: skip

    def _plain(self) -> nn.Module:
        return self.tuned if self.whole else self.method.merge(self.tuned)

    def _answers(self) -> tuple[list[Prediction], list[Prediction]]:
        lines = self.run.lines("predictions")
        if [line["row"] for line in lines] != [record["row"] for record in self.test]:
            problem = "predictions.jsonl holds other rows than the data does now"
            remedy = "Give the data back as it was, or train again."
            raise RunError(Fault(problem, where=str(self.run.path), remedy=remedy))
        return [line["base"] for line in lines], [line["tuned"] for line in lines]


# ------------------------------------------------------------------------ running
def modules() -> dict[str, ModuleType]:
    """Every gauge by its name."""
    folder = "runs/evidence/gauges"
    files = [name.replace("-", "_") for name in find.names(folder)]
    return {name: importlib.import_module(f"tunewright.{folder.replace('/', '.')}.{name}") for name in files}


def measure_missing(ground: Ground, say: Say, *, quick: bool, again: bool = False) -> list[str]:
    """Measure what `gauges/` does not hold yet; the names of what was measured or tried.

    again: also what could not be measured before. On several processes nothing is asked of the models: only the
    first one comes here, and they answer together.
    """
    run, gauges = ground.run, modules()
    (run.path / "gauges").mkdir(exist_ok=True)
    found = read(run)
    quick = quick or distributed.size() > 1
    left = [name for name in gauges if name not in found or (again and "not_run" in found[name])]
    left = [name for name in left if not (quick and _passes(gauges[name]))]
    sides = ground.sides(quick) if left else None
    for name in left:
        assert sides is not None
        run.write_json(f"gauges/{name}.json", _measured(gauges[name], name, sides, say))
        sync(run.path / "gauges")
    settle(run, gauges)
    return left


def _passes(gauge: ModuleType) -> bool:
    return bool(getattr(gauge, "PASSES", False))


def _measured(gauge: ModuleType, name: str, sides: Sides, say: Say) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        found = json.loads(json.dumps(gauge.measure(sides), allow_nan=False))
    except NotRun as reason:
        return {"not_run": str(reason)}
    except Exception as error:  # a gauge is worth less than the run that it looks at
        what = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        say(f"{_about(gauge, name)} was not measured: {what}")
        return {"not_run": FAILED + what}
    return {"seconds": round(time.perf_counter() - began, 2), **found}


# ----------------------------------------------------------------------- the record
def read(run: RunDir) -> dict[str, dict[str, Any]]:
    """What the run's gauges found, by name; a file that cannot be read counts as absent."""
    found = {}
    for path in sorted((run.path / "gauges").glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(value, dict):
            found[path.stem] = value
    return found


def settle(run: RunDir, gauges: Mapping[str, ModuleType] | None = None) -> None:
    """What stands in the verdict as not measured, after the gauges: each that did not run, with its reason."""
    gauges = modules() if gauges is None else gauges
    evidence, found = run.read_json("evidence.json"), read(run)
    ours = tuple(f"{_about(gauge, name)} (" for name, gauge in gauges.items())
    others = [line for line in evidence["verdict"]["not_measured"] if line != GAUGED and not line.startswith(ours)]
    absent = [
        f"{_about(gauge, name)} ({found[name]['not_run'] if name in found else LATER})"
        for name, gauge in gauges.items()
        if "not_run" in found.get(name, {"not_run": ""})
    ]
    evidence["verdict"]["not_measured"] = [*others, *absent]
    run.write_json("evidence.json", evidence)


def _about(gauge: ModuleType, name: str) -> str:
    return str(getattr(gauge, "ABOUT", name.replace("_", " ")))
