"""The gauge of groups: intervals, Holm over all questions, a planted weak group, no change where nothing changed."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tunewright.contracts import Baseline, Loaded, Metric
from tunewright.runs.evidence.gauges import groups
from tunewright.runs.evidence.sides import NotRun, Sides
from tunewright.tasks.text_classification import TextClassification

ACCURACY = Metric("accuracy")


def sides(rows: list[dict[str, Any]], base: list[bool], tuned: list[bool], **more: Any) -> Sides:
    """Sides of a made-up run: every row's truth is "yes", an answer is right or wrong as told."""
    answers = [
        [{"label": "yes" if ok else "no", "score": 0.8, "scores": {"yes": 0.8 if ok else 0.2, "no": 0.2 if ok else 0.8}}
         for ok in side] for side in (base, tuned)
    ]  # fmt: skip
    records = [
        {"text": "a", "label": "yes", "row": str(i), "where": str(i), "extra": row} for i, row in enumerate(rows)
    ]
    usual: dict[str, Any] = {
        "task": TextClassification(), "loaded": Loaded(None, None, None, ("no", "yes")), "tuned": None, "base": None,  # type: ignore[arg-type]
        "plain": None, "baseline": Baseline("majority", "", lambda rows: []), "training": (), "validation": (),
        "test": records, "before": answers[0], "after": answers[1], "margin": 0.02, "group": None, "seed": 0,
    }  # fmt: skip
    return Sides(**usual | more)


def test_without_a_named_column_it_does_not_run_and_says_which_key():
    with pytest.raises(NotRun, match=r"no column named: evaluate\.groups"):
        groups.measure(sides([{}] * 30, [True] * 30, [True] * 30))


def test_a_column_that_parts_nothing_is_left_out_with_the_reason():
    rows = [{"same": "x", "id": i} for i in range(60)]
    with pytest.raises(NotRun, match=r"same: 1 value .*id: 60 different values"):
        groups.measure(sides(rows, [True] * 60, [False] * 60, groups=("same", "id")))


def test_scores_by_group_are_the_counts_by_hand():
    rows = [{"region": name} for name in ["north"] * 30 + ["south"] * 20 + ["east"] * 10] + [{"region": None}] * 5
    base = [True] * 15 + [False] * 15 + [True] * 10 + [False] * 10 + [True] * 10 + [True] * 5
    tuned = [True] * 27 + [False] * 3 + [True] * 8 + [False] * 12 + [False] * 10 + [True] * 5
    found = groups.measure(sides(rows, base, tuned, groups=("region",)))
    by = {group["value"]: group for group in found["columns"][0]["groups"]}
    assert {name: (g["n"], g["base"], g["tuned"], g["few"]) for name, g in by.items()} == {
        "north": (30, 0.5, 0.9, False), "south": (20, 0.5, 0.4, False), "east": (10, 1.0, 0.0, True),
    }  # fmt: skip
    assert by["south"]["difference"] == pytest.approx(-0.1)
    # Wilson by hand: (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
    z, n, p = 1.959964, 30, 0.9
    half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    middle = (p + z * z / 2 / n) / (1 + z * z / n)
    assert by["north"]["tuned_ci95"] == pytest.approx([middle - half, middle + half], abs=1e-5)
    column = found["columns"][0]
    assert column["without"] == 5
    assert column["worst"]["tuned"] == "south", "east has too few rows to be ranked"
    assert column["gap"]["tuned"] == pytest.approx(0.5)
    assert found["tests"] == 4, "two questions for each of the two large groups"
    assert by["east"]["changed"] == "", "ten rows are shown, not judged"


def test_fisher_is_the_tables_counted_out():
    for right, n, other, other_n in ((7, 12, 3, 11), (0, 20, 9, 30), (5, 5, 0, 5), (10, 20, 20, 40)):
        total = right + other
        ways = {k: math.comb(n, k) * math.comb(other_n, total - k)
                for k in range(max(0, total - other_n), min(n, total) + 1)}  # fmt: skip
        whole = sum(ways.values())
        less = sum(w for w in ways.values() if w < ways[right])
        equal = sum(w for w in ways.values() if w == ways[right])
        assert groups.fisher_midp(right, n, other, other_n) == pytest.approx(
            float(Fraction(2 * less + equal, 2 * whole)), abs=1e-9
        )


def flagged(base: np.ndarray, tuned: np.ndarray, values: list[str]) -> list[tuple[str, str, str]]:
    judged = [groups.by_group("g", values, base[i], tuned[i], ACCURACY)["groups"] for i in range(len(base))]
    for one in judged:
        groups.correct(one, True)
    return [[(g["value"], g["changed"], g["stands"]) for g in one if g["changed"] or g["stands"]] for one in judged]


def test_where_nothing_differs_at_most_one_run_in_twenty_is_flagged(monkeypatch):
    """12 groups of 60 rows, base and tuned equally good in all of them: any flag is a false alarm."""
    monkeypatch.setattr(groups, "gap", lambda *_: None)  # draws thousands; its numbers raise no alarm
    rng, runs = np.random.default_rng(0), 200
    values = [f"group {i % 12}" for i in range(720)]
    base = (rng.random((runs, 720)) < 0.8).astype(float)
    swapped = rng.random((runs, 720)) < 0.15  # base and tuned differ on these rows, in no one's favour
    tuned = np.where(swapped, (rng.random((runs, 720)) < 0.8).astype(float), base)
    alarms = sum(bool(found) for found in flagged(base, tuned, values))
    print(f"false alarms: {alarms} of {runs} runs")
    assert alarms <= 0.05 * runs + 2 * math.sqrt(0.05 * 0.95 * runs)
    assert alarms / runs <= 0.05


def test_rows_of_one_document_are_no_independent_witnesses(monkeypatch):
    """30 documents of 20 like rows in 3 groups of documents, none special: rows taken singly would say otherwise."""
    monkeypatch.setattr(groups, "gap", lambda *_: None)
    rng, runs = np.random.default_rng(6), 40
    units: list[str | None] = [f"document {i // 20}" for i in range(600)]
    values = [f"group {i // 20 % 3}" for i in range(600)]
    alarms = {"rows": 0, "documents": 0}
    for _ in range(runs):
        right = np.repeat((rng.random(30) < 0.7).astype(float), 20)
        for counted, by in (("rows", None), ("documents", units)):
            found = groups.by_group("g", values, right, right, ACCURACY, by)["groups"]
            groups.correct(found, True)
            alarms[counted] += any(group["stands"] for group in found)
    print(f"false alarms of {runs} runs: {alarms}")
    assert alarms["documents"] <= 2 < 20 <= alarms["rows"]


def test_a_planted_weak_group_is_found_and_no_other(monkeypatch):
    """12 groups of 60; in one the tuned model is right on half of the rows, elsewhere on nine of ten."""
    monkeypatch.setattr(groups, "gap", lambda *_: None)
    rng, runs = np.random.default_rng(1), 40
    values = [f"group {i % 12:02}" for i in range(720)]
    weak = np.array([value == "group 07" for value in values])
    base = (rng.random((runs, 720)) < 0.9).astype(float)
    tuned = np.where(weak, (rng.random((runs, 720)) < 0.5).astype(float), base)
    found = flagged(base, tuned, values)
    assert sum(("group 07", "worse", "worse") in one for one in found) >= 38
    others = [one for one in found if any(name != "group 07" for name, _, _ in one)]
    assert len(others) <= 4


def test_base_against_base_changes_nothing():
    rng = np.random.default_rng(2)
    right = [bool(x) for x in rng.random(300) < 0.7]
    rows = [{"region": "abcde"[i % 5]} for i in range(300)]
    found = groups.measure(sides(rows, right, right, groups=("region",)))
    column = found["columns"][0]
    assert {g["difference"] for g in column["groups"]} == {0.0}
    assert {g["p"] for g in column["groups"]} == {1.0}
    assert (column["gap"]["change"], column["gap"]["ci95"]) == (0.0, [0.0, 0.0])
    assert column["worst"]["base"] == column["worst"]["tuned"]
    assert not any(g["changed"] for g in column["groups"])


def test_a_gap_stands_beside_what_chance_alone_shows():
    rng = np.random.default_rng(3)
    member = np.arange(400) % 8
    base = (rng.random(400) < 0.7).astype(float)
    tuned = np.where(member == 3, 0.0, base)
    found = groups.gap(member, range(8), base, tuned, seed=0)
    assert found["tuned"] > 2.5 * found["chance_p95"]["base"]
    # by hand: the gap of 8 means of 50 rows at 0.7 is about 2.85 standard errors of .065
    assert 0.15 < found["chance_p95"]["base"] < 0.36
    assert found == groups.gap(member, range(8), base, tuned, seed=0)


def test_lower_is_better_turns_the_words_round():
    loss = Metric("loss", higher_is_better=False, proportion=False)
    rng = np.random.default_rng(4)
    values = ["a" if i % 2 else "b" for i in range(120)]
    base = rng.random(120) + 1
    tuned = base + np.where([v == "a" for v in values], 1.0, -0.5)
    column = groups.by_group("g", values, base, tuned, loss)
    groups.correct(column["groups"], False)
    assert [(g["value"], g["changed"], g["stands"]) for g in column["groups"]] == [
        ("a", "worse", "worse"), ("b", "better", "better")]  # fmt: skip
    assert column["worst"]["tuned"] == "a"
