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
    return {
        "metric": metric,
        "proportion": runs[0].read_json("evidence.json")["measures"][0].get("proportion", True),
        "n": len(rows),
        "runs": [_line(run, own, [s[row] for row in rows]) for run, s in zip(runs, scores, strict=True)],
    }


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
