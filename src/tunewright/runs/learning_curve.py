"""Would more data help? The run's recipe again on an eighth, a quarter and half of its training rows.

Each smaller run is a run like any other, in RUN/curve/ROWS, on rows that are all among those of the next larger one;
the held-out rows stay the same and so do the passes over the data. Writes RUN/learning_curve.json. Knows run folders;
the curve itself stands in metrics/power_law.py.

One run at each size: its intervals cover rows, not seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunewright.data import canaries
from tunewright.errors import Fault, RunError
from tunewright.metrics import power_law, statistics
from tunewright.recipe import ExportSpec, Recipe
from tunewright.rundir import RunDir
from tunewright.runs import checking
from tunewright.runs.report.card import write_card
from tunewright.runs.report.page import write_report
from tunewright.runs.training import train

Say = Callable[[str], None]
Floats = npt.NDArray[np.float64]
SHARES = (1 / 8, 1 / 4, 1 / 2)  # doublings, so that a step says what the next one may bring
FEWEST_ROWS = 16  # to train on; and two of each label
DRAWS = 1000  # of held-out rows, for the interval of what doubling would add


def learning_curve(folder: Path, base: str | None, say: Say) -> dict[str, Any]:
    """Train the smaller runs that are not there yet, and write what they show. Returns what learning_curve.json holds.

    base: where the base lies now. Raises RunError if the run is not finished, or has too few training rows.
    """
    run = RunDir.open(folder)
    if not run.finished:
        raise RunError(Fault("not finished, so there is nothing to compare with", where=str(run.path)))
    with run.locked():
        recipe = run.recipe()
        if base:
            recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, checkpoint=base))
        prepared = checking.prepare(recipe)
        n = sum(not canaries.is_planted(r) for r in prepared.data.train)  # planted ones come on top at every size
        wanted, left_out = sizes(n, len(prepared.data.labels), run.path)
        for line in announced(wanted, n, run.read_json("evidence.json")["cost"]["train_seconds"], left_out):
            say(line)
        runs = {size: train(smaller(recipe, size, n), run.path / "curve" / str(size), say=say) for size in wanted}
        metric = next((m for m in prepared.task.metrics if m.pool is None), None)
        if metric is None:
            raise RunError(Fault("this task's metrics exist for all rows together only", where=str(run.path)))
        scores = {size: _scores(one, metric.name) for size, one in (*runs.items(), (n, run))}
        found = curve(scores, _scores(run, metric.name, "base"), metric.higher_is_better, metric.proportion)
        facts = {"metric": metric.name, "left_out": left_out, "share_of_rows": {str(s): s / n for s in scores}}
        facts["train_seconds"] = {
            str(size): one.read_json("evidence.json")["cost"]["train_seconds"]
            for size, one in (*runs.items(), (n, run))
        }
        run.write_json("learning_curve.json", facts | found)
        write_report(run.path)
        write_card(run.path)
    return facts | found


# --------------------------------------------------------------------------- before
def sizes(n: int, num_labels: int, where: Path) -> tuple[list[int], list[int]]:
    """(sizes to train on, sizes that are too small), both from small to large."""
    fewest = max(FEWEST_ROWS, 2 * num_labels)
    all_sizes = sorted({round(n * share) for share in SHARES})
    wanted = [size for size in all_sizes if size >= fewest]
    if not wanted:
        problem = f"half of {n} training rows are fewer than {fewest}: nothing could be read from so few"
        raise RunError(Fault(problem, where=str(where)))
    return wanted, [size for size in all_sizes if size < fewest]


def announced(wanted: Sequence[int], n: int, seconds: float, left_out: Sequence[int]) -> list[str]:
    """How long it will take, and what is not trained."""
    share = sum(wanted) / n
    said = [
        f"Training anew on {', '.join(map(str, wanted))} of the run's {n} rows: about {_time(share * seconds)} in "
        f"steps ({share:.3g} times the run's own {_time(seconds)}), and each answers the held-out rows. Interrupted, "
        "the same command goes on."
    ]
    return said + [f"Not trained on {', '.join(map(str, left_out))} rows: too few to learn from."] * bool(left_out)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def smaller(recipe: Recipe, size: int, n: int) -> Recipe:
    """The recipe on `size` of its `n` rows: as many passes over them, and nothing measured but the task."""
    part = recipe.train
    steps: dict[str, Any] = {}
    if part.max_steps is not None:
        steps["max_steps"] = max(1, round(part.max_steps * size / n))
    if part.warmup_steps >= 1:
        steps["warmup_steps"] = float(max(1, round(part.warmup_steps * size / n)))
    why = {"data.limit": "learning curve", "evaluate.quick": "learning curve"}
    why |= {f"train.{key}": "learning curve: the run's own, scaled with the rows" for key in steps}
    return dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, limit=size), train=dataclasses.replace(part, **steps),
        evaluate=dataclasses.replace(recipe.evaluate, quick=True, general=None, groups=()), export=ExportSpec(),
        came_from=recipe.came_from | why,
    )  # fmt: skip


def _scores(run: RunDir, metric: str, side: str = "tuned") -> dict[str, float]:
    import pyarrow.parquet as pq

    lines = pq.read_table(run.path / "scores.parquet").to_pylist()
    return {line["row"]: line[side] for line in lines if line["metric"] == metric and line["split"] == "test"}


# ---------------------------------------------------------------------------- after
def curve(
    scores: Mapping[int, Mapping[str, float]], base: Mapping[str, float], higher_is_better: bool, proportion: bool
) -> dict[str, Any]:
    """Score and interval at each size, what each step brought, the fitted curve and what doubling once more would add.

    scores: size -> row -> score; every size the same rows.
    """
    order = sorted(scores)
    rows = list(base)
    if any(scores[size].keys() != base.keys() for size in order):
        raise RunError(Fault("the smaller runs answered other held-out rows", remedy="Delete RUN/curve and try again."))
    table = np.array([[scores[size][row] for row in rows] for size in order])
    sign = 1.0 if higher_is_better else -1.0
    steps = [_step(order[i], order[i + 1], table[i], table[i + 1]) for i in range(len(order) - 1)]
    fitted = foreseen(order, table, higher_is_better, proportion)
    own = np.array([base[row] for row in rows])
    found = {
        "higher_is_better": higher_is_better, "proportion": proportion, "n": len(rows),
        "base": {"score": float(own.mean()), "ci95": list(statistics.mean_interval(own))},
        "points": [
            {"rows": size, "score": float(line.mean()), "ci95": list(statistics.mean_interval(line))}
            for size, line in zip(order, table, strict=True)
        ],
        "steps": steps, **fitted,
    }  # fmt: skip
    return found | {"sentence": sentence(steps[-1], fitted["doubling"], len(order), sign, proportion)}


def _step(small: int, large: int, before: Floats, after: Floats) -> dict[str, Any]:
    paired = statistics.compare(before, after)
    return {"from": small, "to": large, "difference": paired.difference, "ci95": list(paired.ci95), "p": paired.p,
            "method": paired.method}  # fmt: skip


def foreseen(order: Sequence[int], table: Floats, higher_is_better: bool, proportion: bool) -> dict[str, Any]:
    """The curve through all sizes, and the gain it expects of twice the rows, with an interval over held-out rows.

    table: (S, rows). Held-out rows are drawn anew, the same for every size, and the curve is fitted to each draw.
    """
    errors = 1 - table if higher_is_better and proportion else -table if higher_is_better else table
    floor = proportion or not higher_is_better
    n = order[-1]
    draw = np.random.default_rng(0).integers(0, table.shape[1], size=(DRAWS, table.shape[1]))
    drawn = np.stack([line[draw].mean(axis=1) for line in errors], axis=1)
    measured = errors.mean(axis=1)
    one, many = (power_law.fit(order, e, floor) for e in (measured[None], drawn))
    missed = measured - np.array([one.at(size)[0] for size in order])
    kept = {"kind": one.kind, "unit": n, "a": float(one.a[0]), "b": float(one.b[0])}
    kept |= {"c": float(one.c[0])} if one.kind == "power law" else {}
    kept["missed_most"] = float(np.abs(missed).max())
    kept["expected"] = [{"rows": size, "error": float(one.at(size)[0])} for size in (*order, 2 * n)]
    if one.kind != "power law":
        few = f"fewer than {power_law.FEWEST_POINTS} sizes"
        kept["why_not_power_law"] = few if floor else "this metric has no known end"
    ends = [statistics.mean_interval(line) for line in table]
    if any(abs(miss) > max(high - low for low, high in ends) / 2 for miss in missed):
        reason = "the sizes lie on no such curve: it misses one of them by more than its interval is wide"
        return {"fit": kept, "doubling": {"rows": 2 * n, "not_run": reason}}
    return {"fit": kept, "doubling": {"rows": 2 * n, "draws": DRAWS, **_next(one, many, missed, n)}}


def _next(one: power_law.Curve, many: power_law.Curve, missed: Floats, n: int) -> dict[str, Any]:
    """What twice the rows would add. Its interval has two parts, added in squares: rows drawn anew, and twice what
    the curve misses the measured sizes by."""
    gain, gains = float((one.at(n) - one.at(2 * n))[0]), many.at(n) - many.at(2 * n)
    numbers = 3 if one.kind == "power law" else 2
    off = 2 * math.sqrt(float(np.square(missed).sum()) / max(1, len(missed) - numbers))
    low, high = (float(end) for end in np.quantile(gains, (0.025, 0.975)))
    ends = [gain - math.hypot(max(0.0, gain - low), off), gain + math.hypot(max(0.0, high - gain), off)]
    return {"gain": gain, "ci95": ends}


def sentence(
    step: Mapping[str, Any], doubling: Mapping[str, Any], num_sizes: int, sign: float, proportion: bool
) -> str:
    """What the last doubling brought, and what the next one may."""
    unit = " points" if proportion else ""

    def shown(value: float, signed: bool = True) -> str:
        plus = "+" if signed else ""
        return format(100 * value, f"{plus}.1f") if proportion else format(value, f"{plus}.3g")

    low, high = sorted(sign * end for end in step["ci95"])
    change = sign * step["difference"]
    reach = f"95% interval {shown(low)} to {shown(high)}"
    sure = step["p"] <= 0.05
    if low > 0 and sure:
        said = f"From {step['from']} to {step['to']} rows it gained {shown(change, False)}{unit} ({reach})."
    elif high < 0 and sure:
        said = f"From {step['from']} to {step['to']} rows it lost {shown(-change, False)}{unit} ({reach})."
    else:
        said = f"From {step['from']} to {step['to']} rows no more gain can be seen ({shown(change)}{unit}, {reach})."
    if "not_run" in doubling:
        return f"{said} What twice the rows would add cannot be foreseen: {doubling['not_run']}."
    low, high = doubling["ci95"]
    return (
        f"{said} Doubling once more would be expected to add about {shown(doubling['gain'])}{unit}, between "
        f"{shown(low)} and {shown(high)} (a curve through {num_sizes} sizes, one run each: other seeds could differ)."
    )
