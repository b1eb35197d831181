"""The verdict's words: every row of the wording table in shared/reference/EVIDENCE.md, section 5, and its edges.

Intervals are given, so that the words are tested and not the statistics (those have test_statistics.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunewright.contracts import Metric
from tunewright.runs.evidence.measures import correct, measure
from tunewright.runs.evidence.verdict import advice, verdict, visible_sentence
from tunewright.runs.report.record import Measure

ANSWERS = {"better", "worse", "no meaningful change", "can't tell", "trade", "no verdict"}
NOT_MEASURED = ["what it forgot"]
REACH = 1.959964 + 0.841621  # two-sided 5 %, 80 % power


def found(low: float, high: float, **more: Any) -> dict[str, Any]:
    """A measure whose difference has this interval."""
    return {
        "name": "accuracy", "n": 500, "base": 0.6, "tuned": 0.7, "difference": (low + high) / 2, "ci95": [low, high],
        "p": 0.2 if low <= 0 <= high else 0.001, "higher_is_better": True, "proportion": True,
    } | more  # fmt: skip


def flips(fixed: int = 62, broken: int = 21) -> dict[str, Any]:
    return {"fixed": fixed, "broken": broken, "kept_right": 300, "still_wrong": 100, "examples": []}


def say(low: float, high: float, *, margin: float = 0.02, **more: Any) -> tuple[str, str]:
    said = verdict(found(low, high, **more), flips(), margin, NOT_MEASURED)
    assert said["answer"] in ANSWERS
    assert said["margin"] == margin
    assert said["not_measured"] == NOT_MEASURED
    return said["answer"], said["sentence"]


# ---------------------------------------------------------------- the table's rows
@pytest.mark.parametrize(
    ("low", "high", "answer", "words"),
    [
        (0.048, 0.118, "better", "is clearly better at your task"),
        (0.0201, 0.118, "better", "is clearly better at your task"),
        (0.02, 0.118, "better", "is better at your task, but maybe by less than the 2 points you said matters"),
        (0.001, 0.118, "better", "is better at your task, but maybe by less than the 2 points you said matters"),
        (-0.015, 0.015, "no meaningful change", "shows no meaningful change (within your 2 points)"),
        (-0.02, 0.02, "no meaningful change", "shows no meaningful change (within your 2 points)"),
        (0.001, 0.02, "no meaningful change", "has a real but tiny gain, below your 2 points"),
        (-0.02, -0.001, "no meaningful change", "has a real but tiny loss, below your 2 points"),
        (-0.01, 0.05, "can't tell", "Can't tell: this test could only have seen a change of about"),
        (-0.05, 0.01, "can't tell", "Can't tell: this test could only have seen a change of about"),
        (-0.30, 0.30, "can't tell", "Can't tell: this test could only have seen a change of about"),
        (-0.10, -0.03, "worse", "is worse at your task"),
        (-0.10, -0.001, "worse", "is worse at your task"),
    ],
)
def test_each_interval_has_its_words(low, high, answer, words):
    assert say(low, high)[0] == answer
    assert words in say(low, high)[1]


def test_the_table_is_the_one_in_the_reference():
    path = Path(__file__).parents[2] / "shared/reference/EVIDENCE.md"
    if not path.is_file():
        pytest.skip("shared/reference is not here")
    text = path.read_text(encoding="utf-8")
    for words in ("clearly better", "but maybe by less than the d you said matters", "no meaningful change (within d)",
                  "a real but tiny gain/loss, below d", "this test could only have seen", "would settle it",
                  "fewer than 15 rows"):  # fmt: skip
        assert words in text, words


def test_worse_is_never_softened():
    _, sentence = say(-0.10, -0.001)
    assert not any(word in sentence for word in ("maybe", "slightly", "tiny", "can't", "but"))


# ------------------------------------------------------------------- no verdict
@pytest.mark.parametrize(("n", "answer"), [(1, "no verdict"), (14, "no verdict"), (15, "better")])
def test_below_fifteen_rows_there_is_no_verdict(n, answer):
    said = verdict(found(0.05, 0.1, n=n), flips(3, 0), 0.02, NOT_MEASURED)
    assert said["answer"] == answer
    if answer == "no verdict":
        assert said["sentence"] == f"No verdict: {n} held-out rows are fewer than 15."
        assert "smallest_detectable" not in said  # what was not measured is absent, never zero


def test_without_any_row_there_is_no_verdict():
    assert verdict(None, None, 0.02, NOT_MEASURED)["answer"] == "no verdict"


@pytest.mark.parametrize("overlap", [1, 2])
def test_test_rows_that_also_trained_give_no_verdict_and_the_reason_comes_first(overlap):
    said = verdict(found(0.05, 0.1), flips(), 0.02, NOT_MEASURED, overlap)
    assert said["answer"] == "no verdict"
    assert said["sentence"].startswith(f"No verdict: {overlap} test row")
    assert said["sentence"].endswith("in the training data.")
    assert "better" not in said["sentence"]


# -------------------------------------------------------- interval, test and margin
@pytest.mark.parametrize("p", [0.0501, 0.2, 1.0])
@pytest.mark.parametrize(
    ("low", "high"), [(0.03, 0.1), (0.001, 0.1), (-0.1, -0.03), (-0.1, -0.001), (0.001, 0.01), (-0.01, -0.001)]
)
def test_where_the_test_does_not_agree_it_says_neither_better_nor_worse(p, low, high):
    answer, sentence = say(low, high, p=p)
    assert answer not in ("better", "worse")
    assert not any(word in sentence for word in ("is better", "clearly", "is worse", "real"))


def test_the_margin_is_the_users_and_moves_the_words():
    assert say(0.03, 0.09, margin=0.02)[0] == "better"
    assert "clearly" in say(0.03, 0.09, margin=0.02)[1]
    assert "less than the 5 points" in say(0.03, 0.09, margin=0.05)[1]
    assert say(0.03, 0.09, margin=0.1)[0] == "no meaningful change"
    assert "below your 10 points" in say(0.03, 0.09, margin=0.1)[1]
    assert "within your 1 point)" in say(-0.005, 0.005, margin=0.01)[1]
    assert say(0.0001, 0.0002, margin=0.0)[0] == "better"


# --------------------------------------------------------------- lower is better
LOSS = {"name": "log_loss", "higher_is_better": False, "proportion": False, "base": 0.8, "tuned": 0.5}


@pytest.mark.parametrize(
    ("low", "high", "answer", "words"),
    [
        (-0.40, -0.20, "better", "is clearly better at your task"),
        (-0.40, -0.01, "better", "but maybe by less than the 0.02 you said matters"),
        (-0.019, -0.001, "no meaningful change", "real but tiny gain"),
        (0.001, 0.019, "no meaningful change", "real but tiny loss"),
        (-0.40, 0.10, "can't tell", "could only have seen a change of about"),
        (0.01, 0.40, "worse", "is worse at your task"),
    ],
)
def test_where_lower_is_better_the_words_turn_round_and_the_numbers_do_not(low, high, answer, words):
    said = verdict(found(low, high, **LOSS), None, 0.02, NOT_MEASURED)
    assert said["answer"] == answer
    assert words in said["sentence"]
    assert (
        f"changed log_loss from 0.8 to 0.5 ({(low + high) / 2:+.3g}, 95% interval {low:+.3g} to {high:+.3g})"
        in (said["sentence"])
    )
    assert "points" not in said["sentence"]


# ------------------------------------------------------------- what the sentence says
def rows(n: int, fixed: int, broken: int) -> tuple[list[float], list[float]]:
    kept = n - fixed - broken
    return [0.0] * fixed + [1.0] * broken + [1.0] * kept, [1.0] * fixed + [0.0] * broken + [1.0] * kept


def judged(n: int, fixed: int, broken: int, margin: float = 0.02) -> dict[str, Any]:
    """The verdict on right/wrong rows with so many flips."""
    measured = measure(Metric("accuracy"), *rows(n, fixed, broken), None, "zero-shot")
    return verdict(measured, flips(fixed, broken), margin, NOT_MEASURED)


def test_the_example_of_the_design_comes_out_as_it_is_printed_there():
    assert judged(500, 62, 21)["sentence"] == (
        "The tuned model is clearly better at your task: it fixed 62 of 500 rows and broke 21 "
        "(+8.2 points, 95% interval +4.8 to +11.8)."
    )


@pytest.mark.parametrize(("fixed", "broken"), [(62, 21), (21, 62), (5, 4), (0, 0), (30, 0)])
def test_every_sentence_carries_flips_and_points(fixed, broken):
    sentence = judged(500, fixed, broken)["sentence"]
    assert f"fixed {fixed} of 500 rows and broke {broken} (" in sentence
    assert f"{100 * (fixed - broken) / 500:+.1f} points, 95% interval " in sentence
    assert sentence.endswith(").")


def test_cant_tell_says_what_could_have_been_seen_and_how_many_rows_would_settle_it():
    n, fixed, broken = 100, 8, 4
    said = judged(n, fixed, broken)
    assert said["answer"] == "can't tell"
    share, change = 12 / 100, 4 / 100
    visible = REACH * math.sqrt(share / n)
    assert said["smallest_detectable"] == pytest.approx(visible, abs=1e-4)
    assert f"a change of about {100 * visible:.2g} points" in said["sentence"]
    more = share * (REACH / change) ** 2 - n
    words = said["sentence"].partition("; about ")[2].partition(" more rows would settle it")[0]
    assert more <= int(words) <= 1.1 * more + 1


def test_rows_that_are_no_flips_ask_for_rows_of_the_margin():
    said = judged(30, 0, 0)  # nothing differs: the margin is what must be shown
    assert said["answer"] == "can't tell"
    words = said["sentence"].partition("; about ")[2].partition(" more rows")[0]
    assert int(words) > 100


@pytest.mark.parametrize("answer", sorted(ANSWERS - {"trade"}))
def test_every_answer_has_one_line_of_advice(answer):
    line = advice({"answer": answer}, flips())
    assert line
    assert "\n" not in line


def test_a_worse_model_is_not_advised():
    assert advice({"answer": "worse"}, flips()).startswith("Do not use it")
    assert "Read its answers" in advice({"answer": "better"}, None), "a lower loss alone is no reason to use it"


# --------------------------------------------------------------- before the first step
@pytest.mark.parametrize(("n", "points"), [(50, (13, 9, 18)), (100, (9, 6, 13)), (500, (4, 3, 6)), (2000, (2, 1.4, 3))])
def test_what_a_test_set_can_show_is_said_beforehand(n, points):
    """For 80 % power: 12.5, 8.9, 17.7 at 50 rows; 8.9, 6.3, 12.5 at 100; 4.0, 2.8, 5.6; 2.0, 1.4, 2.8."""
    usual, few, many = points
    text = visible_sentence(n)
    assert f"no change under {usual} points" in text
    assert f"({few} points on a twentieth, {many} on a fifth)" in text


def test_a_test_set_that_is_too_small_is_said_beforehand():
    assert "there will be no verdict" in visible_sentence(14)
    assert "no verdict" not in visible_sentence(15)


# ------------------------------------------------------------------- several measures
def test_the_declared_metric_stands_alone_and_the_others_are_corrected_by_family():
    asked = [
        {"name": "accuracy", "about": "task", "p": 0.04},
        {"name": "macro_f1", "about": "task", "p": 0.01},
        {"name": "log_loss", "about": "task", "p": 0.03},
        {"name": "accuracy", "about": "general", "set": "news", "p": 0.02},
        {"name": "log_loss", "about": "general", "set": "news", "p": 0.2},
        {"name": "accuracy", "about": "general", "set": "stories", "p": 0.5},
        {"name": "log_loss", "about": "general", "set": "stories", "p": 0.01},
    ]
    correct(asked, "accuracy")
    assert "p_holm" not in asked[0]
    # by hand: two others (.01 x2, .03 x1), two sets (.02 x2, .5 x1), two other metrics there (.01 x2, .2 x1)
    assert [m["p_holm"] for m in asked[1:]] == pytest.approx([0.02, 0.03, 0.04, 0.2, 0.5, 0.02])


def test_chance_alone_finds_something_in_at_most_one_run_of_twenty():
    """1,000 tunings without effect, four further sets each: without Holm one in six would be called changed.

    6,000 sets gave 3.4 to 4.9 % at 80 and 300 rows; two standard errors of 1,000 are 1.4 points.
    """
    rng, corrected, bare = np.random.default_rng(0), 0, 0
    for run in range(1000):
        asked = []
        for name in "abcd":
            base, tuned = rng.random(80) < 0.7, rng.random(80) < 0.7
            asked.append(measure(Metric("accuracy"), base.astype(int), tuned.astype(int), None, None, "general", run)
                         | {"set": name})  # fmt: skip
        correct(asked, "accuracy")
        bare += any(m["p"] <= 0.05 for m in asked)
        corrected += any(Measure.read(m, 0.0).finding in ("better", "clearly better", "worse") for m in asked)
    assert corrected / 1000 <= 0.05 + 0.014
    assert bare / 1000 > 0.1


def test_a_finding_of_the_report_needs_interval_and_corrected_p():
    row = found(0.03, 0.12) | {"about": "task", "p": 0.02}
    assert Measure.read(row, 0.02).finding == "clearly better"
    assert Measure.read(row | {"p_holm": 0.06}, 0.02).finding == "can't tell"
    assert Measure.read(row | {"p_holm": 0.04}, 0.02).finding == "clearly better"
