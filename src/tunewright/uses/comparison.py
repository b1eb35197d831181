"""Runs that were measured on the same held-out rows, side by side: each against its baseline, and against each other.

Knows run folders only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright.errors import Fault, RunError
from tunewright.metrics import statistics
from tunewright.rundir import RunDir

SAME = "Use the same data, holdout and seed, or name a test file in both recipes."


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """The first metric of every run on the shared rows; differences are of each run to the first one.

    Raises RunError if a run is unfinished, or if the runs do not share their test rows.
    """
    runs = [RunDir.open(path) for path in paths]
    unfinished = [run for run in runs if not run.finished]
    if unfinished or len(runs) < 2:
        problem = "not finished" if unfinished else "one run cannot be compared"
        raise RunError([Fault(problem, where=str(run.path)) for run in unfinished or runs] or Fault("no runs given"))
    metric = runs[0].read_json("evidence.json")["measures"][0]["name"]
    scores = [_scores(run, metric) for run in runs]
    rows = list(scores[0])
    first = _test_files(runs[0])
    for run in runs[1:]:
        if _test_files(run) != first:
            problem = f"its test rows come from another file than those of {runs[0].path.name} (SHA-256 differs)"
            raise RunError(Fault(problem, where=str(run.path), remedy=SAME))
    for run, found in zip(runs, scores, strict=True):
        if set(found) != set(rows):
            shared = len(set(found) & set(rows))
            raise RunError(
                Fault(
                    f"shares {shared} of {len(found)} test rows with {runs[0].path.name}, so pairs cannot be made",
                    where=str(run.path),
                    remedy=SAME,
                )
            )
    own = [scores[0][row] for row in rows]
    measure = runs[0].read_json("evidence.json")["measures"][0]
    lists = [[found[row] for row in rows] for found in scores]
    return {
        "metric": metric,
        "proportion": measure.get("proportion", True),
        "higher_is_better": measure.get("higher_is_better", True),
        "n": len(rows),
        "runs": [_line(run, own, values) for run, values in zip(runs, lists, strict=True)],
        **_against_best(lists, 1.0 if measure.get("higher_is_better", True) else -1.0),
    }


def _against_best(lists: Sequence[Sequence[float]], sign: float) -> dict[str, Any]:
    """Every run's score with its interval, and its paired difference to the best run; p corrected for all pairs (Holm).

    The best is the best on these very rows, which flatters it.
    """
    means = [sum(values) / len(values) for values in lists]
    best = max(range(len(lists)), key=lambda i: (sign * means[i], -i))
    paired = {i: statistics.compare(lists[best], values) for i, values in enumerate(lists) if i != best}
    corrected = dict(zip(paired, statistics.holm([pair.p for pair in paired.values()]), strict=True))
    pairs = [
        {"run": i, "difference": pair.difference, "ci95": list(pair.ci95), "p": pair.p, "p_holm": corrected[i],
         "method": pair.method} for i, pair in paired.items()
    ]  # fmt: skip
    scores = [{"score": mean, "ci95": list(statistics.mean_interval(v))} for mean, v in zip(means, lists, strict=True)]
    return {"best": best, "scores": scores, "against_best": pairs}


def differing(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The test rows on which the runs' answers differ: what each said, and its score where the row has one.

    Rows that most runs have right come first: there, one run alone is at fault. The input is known where one of the
    runs kept it among its examples, and None elsewhere.
    """
    runs = [RunDir.open(path) for path in paths]
    metric = runs[0].read_json("evidence.json")["measures"][0]["name"]
    scores, inputs = [_scores(run, metric) for run in runs], _inputs(runs)
    lines = [{line["row"]: line for line in run.lines("predictions")} for run in runs]
    found = []
    for row, first in lines[0].items():
        answers = [_answer(side.get(row)) for side in lines]
        if len({str(answer) for answer in answers}) > 1:
            values = [side.get(row) for side in scores]
            found.append({"row": row, "input": inputs.get(row), "truth": first.get("truth"), "answers": answers,
                          "scores": values})  # fmt: skip
    return sorted(found, key=lambda line: -sum(value or 0.0 for value in line["scores"]))


def _answer(line: dict[str, Any] | None) -> Any:
    said = (line or {}).get("tuned") or {}
    return said.get("label", said.get("text"))


def _inputs(runs: Sequence[RunDir]) -> dict[str, str]:
    found: dict[str, str] = {}
    for run in runs:
        evidence = run.read_json("evidence.json")
        flips = evidence.get("flips") or {}
        for example in [*flips.get("examples", ()), *flips.get("others", ()), *evidence.get("samples", ())]:
            found.setdefault(example["row"], example["input"])
    return found


def _test_files(run: RunDir) -> set[str]:
    """SHA-256 of the files that the test rows came from: `rows.csv:7` of two files are two rows."""
    files = run.read_json("data.json")["files"]
    named = {file["sha256"] for file in files if "test" in file["split"].split("+")}
    return named or {file["sha256"] for file in files}


def _scores(run: RunDir, metric: str) -> dict[str, float]:
    import pyarrow.parquet as pq

    lines = pq.read_table(run.path / "scores.parquet").to_pylist()
    return {line["row"]: line["tuned"] for line in lines if line["metric"] == metric and line["split"] == "test"}


def _line(run: RunDir, first: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    evidence = run.read_json("evidence.json")
    measure = evidence["measures"][0]
    paired = statistics.compare(first, own)
    return {
        "run": run.path.name,
        "method": run.recipe().method.name,
        "baseline": evidence["baseline"]["name"],
        "base": measure["base"],
        "tuned": measure["tuned"],
        "gain": measure["difference"],
        "gain_ci95": measure["ci95"],
        "verdict": evidence["verdict"]["answer"],
        "against_first": paired.difference,
        "against_first_ci95": list(paired.ci95),
        "train_seconds": evidence["cost"]["train_seconds"],
        "trainable_parameters": evidence["cost"]["trainable_parameters"],
    }


def as_text(table: dict[str, Any]) -> str:
    """The comparison for people, in points of a hundred where the metric is a share."""
    points = table.get("proportion", True)
    unit = " points" if points else ""

    def change(value: float) -> str:
        return f"{100 * value:+.1f}" if points else f"{value:+.3g}"

    lines = [f"{table['metric']} on the same {table['n']} held-out rows", ""]
    lines.append(f"{'run':<20} {'before':>7} {'after':>7} {'gain':>7}   {'95% interval':<16} {'training':>9}   verdict")
    for line in table["runs"]:
        low, high = (change(v) for v in line["gain_ci95"])
        lines.append(
            f"{line['run']:<20} {line['base']:>7.3f} {line['tuned']:>7.3f} {change(line['gain']):>7}   "
            f"{low + ' to ' + high:<16} {line['train_seconds']:>7.1f} s   {line['verdict']}"
        )
    first = table["runs"][0]["run"]
    for line in table["runs"][1:]:
        low, high = (change(v) for v in line["against_first_ci95"])
        lines.append(f"\n{line['run']} against {first}: {change(line['against_first'])}{unit} (95%: {low} to {high}).")
    return "\n".join(lines)
