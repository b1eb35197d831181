"""Calibration against hand calculation, against draws of calibrated rows, and against a planted temperature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_gauges_groups import sides

from tunewright.contracts import Baseline
from tunewright.metrics import calibration
from tunewright.runs.evidence.gauges import calibration as gauge
from tunewright.runs.evidence.sides import NotRun


def test_the_error_is_the_one_by_hand():
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.62, 0.62, 0.35])
    right = np.array([1, 1, 0, 1, 0, 1, 0.0])
    # bins of a fifteenth: .95 in one, .62 in one, .35 in one: (4 |.95 - .75| + 2 |.62 - .5| + |.35 - 0|) / 7
    assert calibration.expected_error(sure, right) == pytest.approx((4 * 0.20 + 2 * 0.12 + 0.35) / 7)
    # in two bins .95 and .62 stand together: (|3.8 + 1.24 - 4| + .35) / 7
    assert calibration.expected_error(sure, right, bins=2) == pytest.approx((1.04 + 0.35) / 7)


def test_edges_and_ends_fall_into_bins():
    sure = np.array([0.0, 1 / 15, 1.0])
    assert calibration.expected_error(sure, np.array([0.0, 0.0, 1.0])) == pytest.approx((1 / 15) / 3)


@pytest.mark.parametrize("n", [100, 300, 1000])
def test_the_floor_is_what_calibrated_rows_show(n):
    """Against rows drawn here, which are right as often as they say; it falls with the root of the rows."""
    rng = np.random.default_rng(n)
    sure = rng.uniform(0.5, 1, n)
    floor = calibration.floor(sure, seed=1)
    seen = [calibration.expected_error(sure, (rng.random(n) < sure).astype(float)) for _ in range(1000)]
    assert np.mean(floor) == pytest.approx(np.mean(seen), rel=0.05)
    assert np.quantile(floor, 0.95) == pytest.approx(np.quantile(seen, 0.95), rel=0.08)
    # 8 bins hold rows; in each the share right misses its mean by sqrt(2 / pi) standard errors
    variance = (sure * (1 - sure)).mean()
    assert np.mean(floor) == pytest.approx(np.sqrt(2 / np.pi * variance * 8 / n), rel=0.1)


def test_a_calibrated_model_is_called_so_in_nineteen_of_twenty_runs():
    rng = np.random.default_rng(5)
    called = []
    for run in range(200):
        sure = rng.uniform(0.4, 1, 150)
        called.append(gauge.one_side(sure, (rng.random(150) < sure).astype(float), run)["calibrated"])
    assert 0.90 <= np.mean(called) <= 0.99


def test_the_surest_rows_are_counted_by_hand():
    sure = np.array([0.9, 0.5, 0.8, 0.8, 0.7, 0.6, 0.95, 0.55, 0.65, 0.99])
    right = np.array([1, 0, 1, 0, 1, 1, 1.0, 0, 0, 1])
    found = {line["threshold"]: line for line in calibration.alone(sure, right)}
    assert list(found) == [0.99, 0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5]  # the two at .8 are answered together
    assert (found[0.8]["n"], found[0.8]["wrong"], found[0.8]["share"]) == (5, 1, 0.5)
    assert (found[0.5]["n"], found[0.5]["wrong"], found[0.5]["error"]) == (10, 4, 0.4)
    assert found[0.9]["error"] == 0
    assert found[0.9]["ci95"][1] > 0.4  # three right rows prove little


def test_a_model_that_is_always_as_sure_has_one_choice():
    found = calibration.alone(np.full(50, 0.55), np.array([1.0, 0.0] * 25))
    assert [(line["share"], line["error"]) for line in found] == [(1.0, 0.5)]


def test_the_intervals_of_all_shares_hold_at_once_in_ninety_five_of_a_hundred_runs():
    """Rows drawn here are wrong as often as 1 - confidence: the true share wrong of every answered set is known."""
    rng = np.random.default_rng(7)
    sure = rng.uniform(0.5, 1, 400)
    held = []
    for _ in range(300):
        lines = calibration.alone(sure, (rng.random(400) < sure).astype(float))
        true = [float((1 - sure[sure >= line["threshold"]]).mean()) for line in lines]
        held.append(all(low <= t <= high for t, (low, high) in zip(true, (x["ci95"] for x in lines), strict=True)))
    assert np.mean(held) >= 0.93


def test_too_sure_is_told():
    rng = np.random.default_rng(6)
    found = gauge.one_side(np.full(400, 0.95), (rng.random(400) < 0.7).astype(float), 0)
    assert not found["calibrated"]
    assert found["above_floor"] == pytest.approx(0.25, abs=0.06)


def test_the_curve_counts_every_row_once():
    rng = np.random.default_rng(7)
    sure = rng.random(237)
    right = (rng.random(237) < sure).astype(float)
    points = calibration.curve(sure, right)
    assert len(points) == 10
    assert sum(p["n"] for p in points) == 237
    assert sum(p["n"] * p["right"] for p in points) == pytest.approx(right.sum())
    assert all(p["ci95"][0] <= p["right"] <= p["ci95"][1] for p in points)
    assert [p["confidence"] for p in points] == sorted(p["confidence"] for p in points)
    assert len(calibration.curve(sure[:30], right[:30])) == 1


def drawn(n: int, planted: float, seed: int) -> tuple[np.ndarray, list[int]]:
    """Rows whose truth is drawn from softmax(z), and what a model says whose logits are `planted` times as large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, 4))

    def softmax(z: np.ndarray) -> np.ndarray:
        powers = np.exp(z - z.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    truth = (softmax(logits).cumsum(1) > rng.random((n, 1))).argmax(1)
    return softmax(planted * logits), [int(t) for t in truth]


@pytest.mark.parametrize("planted", [0.5, 1.0, 2.0, 4.0])
def test_a_planted_temperature_is_recovered(planted):
    shares, truth = drawn(4000, planted, seed=8)
    assert calibration.fit_temperature(shares, truth) == pytest.approx(planted, rel=0.06)


def test_temperature_one_changes_nothing_and_no_answer_ever_changes():
    shares, _ = drawn(50, 2.0, seed=9)
    np.testing.assert_allclose(calibration.at_temperature(shares, 1.0), shares, atol=1e-12)
    cooled = calibration.at_temperature(shares, 3.0)
    assert (cooled.argmax(1) == shares.argmax(1)).all()
    np.testing.assert_allclose(cooled.sum(1), 1)


# -------------------------------------------------------------------------- the gauge
def run_of(n: int, planted: float, seed: int, **more: Any) -> Any:
    """Sides whose answers are `planted` times too sure, on validation as on held-out rows."""
    shares, truth = drawn(n + 800, planted, seed)
    names = ["a", "b", "c", "d"]
    answers = [
        {"label": names[int(row.argmax())], "score": float(row.max()),
         "scores": dict(zip(names, map(float, row), strict=True))}
        for row in shares
    ]  # fmt: skip
    records = [{"text": "t", "label": names[t], "row": str(i), "where": "", "extra": {}} for i, t in enumerate(truth)]
    by_row = {record["row"]: answer for record, answer in zip(records, answers, strict=True)}

    def predict(rows: Any) -> list[dict[str, Any]]:
        return [by_row[r["row"]] for r in rows]

    made = sides([], [], [], baseline=Baseline("base", "", predict))
    made = replace(made, test=records[:n], before=answers[:n], after=answers[:n], validation=records[n:], **more)
    object.__setattr__(made, "answers", lambda model, rows, validating=False: predict(rows))
    return made


def test_base_against_base_changes_nothing_and_a_temperature_mends_both():
    found = gauge.measure(run_of(500, 3.0, seed=10))
    assert found["base"] == found["tuned"]
    assert found["brier"]["difference"] == 0.0
    assert found["too_sure"]["difference"] == 0.0
    assert not found["tuned"]["calibrated"]
    assert found["temperature"]["n"] == 500
    assert found["temperature"]["tuned"]["value"] == pytest.approx(3.0, rel=0.2)
    assert found["temperature"]["tuned"]["calibrated"]
    assert found["temperature"]["tuned"]["brier"] < found["brier"]["tuned"]


def test_brier_and_too_sure_are_the_means_by_hand():
    rows: list[dict[str, Any]] = [{}] * 20
    found = gauge.measure(sides(rows, [True] * 10 + [False] * 10, [True] * 16 + [False] * 4))
    assert found["brier"]["base"] == pytest.approx((10 * 0.04 + 10 * 0.64) / 20)
    assert found["brier"]["tuned"] == pytest.approx((16 * 0.04 + 4 * 0.64) / 20)
    assert found["too_sure"]["base"] == pytest.approx(0.3)
    assert found["tuned"]["ece"] == pytest.approx(0.0, abs=1e-12)


def test_without_validation_rows_only_the_temperature_is_missing():
    found = gauge.measure(replace(run_of(100, 1.0, 11), validation=()))
    assert "no validation rows" in found["temperature"]["not_run"]
    assert found["tuned"]["ece"] > 0


def test_answers_without_confidence_are_not_measured():
    made = sides([{}] * 20, [True] * 20, [True] * 20)
    bare = [{k: v for k, v in a.items() if k != "score"} for a in made.before]
    with pytest.raises(NotRun, match="no confidence"):
        gauge.measure(replace(made, before=bare))


def test_few_rows_are_not_measured():
    with pytest.raises(NotRun, match="14 held-out rows are fewer than 15"):
        gauge.measure(sides([{}] * 14, [True] * 14, [True] * 14))


def test_the_same_answers_give_the_same_numbers():
    assert gauge.measure(run_of(200, 2.0, 12)) == gauge.measure(run_of(200, 2.0, 12))
