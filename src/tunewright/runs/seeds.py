"""The same recipe with several seeds: runs side by side in one folder, and what they say together.

Each is a run like any other in OUT/seed-N; the same command goes on where it stopped. Every seed keeps the first
one's held-out rows (`data.seed`). Writes seeds.json beside the runs and into each of them, so that each report says
what the others gave. Knows run folders; the formulas stand in evidence/several.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunewright.contracts import Record, Task
from tunewright.engine import distributed
from tunewright.engine.distributed import from_first, is_first
from tunewright.engine.evaluate import score_rows
from tunewright.errors import Fault, RunError
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir, fresh_path
from tunewright.runs import checking
from tunewright.runs.evidence import gather, several
from tunewright.runs.evidence.verdict import SECOND_SEED
from tunewright.runs.report.card import write_card
from tunewright.runs.report.page import write_report
from tunewright.runs.training import train

Say = Callable[[str], None]
SUMMARY = "seeds.json"


def train_seeds(
    recipe: Recipe, out: Path, num_seeds: int, *, again: bool = False, allow_change: bool = False, say: Say
) -> dict[str, Any]:
    """Train with seeds s, s + 1 ...; what is finished is left as it is. Returns what seeds.json holds.

    Raises like `train`, and RunError where `out` is a run itself.
    """
    distributed.join()
    if again and from_first(out.exists):
        out = from_first(lambda: fresh_path(out))
    if from_first((out / "recipe.yaml").is_file):
        remedy = "Choose another output_dir, or --again for a fresh folder beside it."
        raise RunError(Fault("holds one run, not several", where=str(out), remedy=remedy))
    runs = []
    for place, one in enumerate(seeded(recipe, num_seeds), 1):
        if is_first():
            say(f"\nSeed {one.seed}, {place} of {num_seeds}: {out / f'seed-{one.seed}'}")
        runs.append(train(one, out / f"seed-{one.seed}", allow_change=allow_change, say=say))
    return from_first(lambda: _together(out, recipe, runs, say))


def seeded(recipe: Recipe, num_seeds: int) -> list[Recipe]:
    """The recipe with the next seeds; which rows are held out stays what the first one says."""
    rows = recipe.seed if recipe.data.seed is None else recipe.data.seed
    data = dataclasses.replace(recipe.data, seed=rows)
    why = {"seed": "--seeds", "data.seed": "--seeds: every run answers the same held-out rows"}
    return [
        dataclasses.replace(recipe, seed=recipe.seed + i, data=data, came_from=recipe.came_from | why)
        for i in range(num_seeds)
    ]


def _together(out: Path, recipe: Recipe, runs: Sequence[RunDir], say: Say) -> dict[str, Any]:
    say(f"\nPutting {len(runs)} runs together.")
    prepared = checking.prepare(seeded(recipe, 1)[0])
    summary = summarise(prepared, runs)
    RunDir(out).write_json(SUMMARY, summary)
    for run in runs:
        with run.locked():
            run.write_json(SUMMARY, summary)
            _no_longer_alone(run)
            write_report(run.path)
            write_card(run.path)
    say(f"\n{summary['verdict']['sentence']}\nReport: {runs[0].path / 'report.html'}")
    return summary


def _no_longer_alone(run: RunDir) -> None:
    """Take back what the run's evidence said of other seeds while there were none."""
    evidence = run.read_json("evidence.json")
    lines = evidence["verdict"]["not_measured"]
    evidence["verdict"]["not_measured"] = [line for line in lines if line != gather.OTHER_SEEDS]
    evidence["advice"] = evidence["advice"].replace(SECOND_SEED, "").strip()
    run.write_json("evidence.json", evidence)


# ------------------------------------------------------------------------ the numbers
def summarise(prepared: checking.Prepared, runs: Sequence[RunDir]) -> dict[str, Any]:
    """What seeds.json holds: each run, each metric over rows and runs, agreement by row, verdict."""
    recipe, task, rows = prepared.recipe, prepared.task, prepared.data.test
    evidence = [run.read_json("evidence.json") for run in runs]
    seeds = [run.recipe().seed for run in runs]
    sides = {side: [score_rows(task, _answers(run, rows, side), rows) for run in runs] for side in ("base", "tuned")}
    groups = [str(r["extra"].get(recipe.data.group)) for r in rows] if recipe.data.group else None

    def by_run(side: str, name: str) -> list[list[Any]]:
        return [[scores[name] for scores in run] for run in sides[side]]

    measures = [
        several.measure(m, by_run("base", m.name), by_run("tuned", m.name), groups, recipe.seed)
        for m in task.metrics if rows
    ]  # fmt: skip
    measures += _general(task, prepared.general, runs, recipe.seed)
    first = task.metrics[0].name
    return {
        "seeds": [_line(run, seed, found) for run, seed, found in zip(runs, seeds, evidence, strict=True)],
        "rows": several.agreement(by_run("base", first), by_run("tuned", first)) if rows else {"not_run": "no rows"},
        "measures": measures,
        "verdict": several.judged(measures, seeds, recipe.evaluate.margin),
        "held_out_by": recipe.data.seed,
    }


def _line(run: RunDir, seed: int, evidence: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": seed, "run": run.path.name, "verdict": evidence["verdict"]["answer"],
        "train_seconds": evidence["cost"]["train_seconds"],
        "measures": [m for m in evidence["measures"] if m["about"] == "task"],
    }  # fmt: skip


def _answers(run: RunDir, rows: Sequence[Record], side: str) -> list[dict[str, Any]]:
    lines = run.lines("predictions")
    if [line["row"] for line in lines] != [record["row"] for record in rows]:
        problem = "predictions.jsonl holds other rows than the data does now"
        raise RunError(Fault(problem, where=str(run.path), remedy="Give the data back as it was, or train again."))
    return [line[side] for line in lines]


def _general(
    task: Task, sets: Mapping[str, Sequence[Record]], runs: Sequence[RunDir], seed: int
) -> list[dict[str, Any]]:
    """The metrics that stand row by row in scores.parquet, for each set of other skills."""
    found = []
    tables = [_kept_scores(run) for run in runs] if sets else []
    for name, records in sets.items():
        for metric in task.metrics:
            if metric.pool is None:
                pairs = [[table[metric.name, record["row"]] for record in records] for table in tables]
                base, tuned = ([[pair[side] for pair in run] for run in pairs] for side in (0, 1))
                found.append(several.measure(metric, base, tuned, None, seed) | {"about": "general", "set": name})
    return found


def _kept_scores(run: RunDir) -> dict[tuple[str, str], tuple[float, float]]:
    import pyarrow.parquet as pq

    lines = pq.read_table(run.path / "scores.parquet").to_pylist()
    return {(line["metric"], line["row"]): (line["base"], line["tuned"]) for line in lines}
