"""The overfitting gauge: a planted memory is found, rows that are merely easier are not called overfitting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from two_sides import classifier, mood_rows, sides, step

from tunewright.contracts import Baseline
from tunewright.metrics import statistics
from tunewright.metrics.combining import Estimate, apart
from tunewright.runs.evidence.gauges import overfitting as gauge
from tunewright.runs.evidence.sides import NotRun


def scored(rng, n, base, tuned):
    return (rng.random(n) < base).astype(float), (rng.random(n) < tuned).astype(float), None


def test_the_gap_is_newcombes_and_the_rest_the_gain_there_minus_here():
    rng = np.random.default_rng(0)
    train, test = scored(rng, 120, 0.5, 0.95), scored(rng, 100, 0.5, 0.8)
    found = gauge.gaps(train, test, 1.0, 0)

    def share(scores):
        return Estimate(scores.mean(), *statistics.wilson_interval(int(scores.sum()), len(scores)))

    expected = apart(share(train[1]), share(test[1]))
    assert found["tuned"]["difference"] == pytest.approx(train[1].mean() - test[1].mean())
    assert found["tuned"]["ci95"] == pytest.approx([expected.low, expected.high])
    gains = [(t[1] - t[0]).mean() for t in (train, test)]
    assert found["added"]["difference"] == pytest.approx(gains[0] - gains[1])


def test_lower_is_better_turns_every_gap():
    rng = np.random.default_rng(0)
    train = rng.normal(2, 1, 50), rng.normal(0.5, 1, 50), None
    test = rng.normal(2, 1, 50), rng.normal(1, 1, 50), None
    plain, turned = gauge.gaps(train, test, 1.0, 0), gauge.gaps(train, test, -1.0, 0)
    for key in ("tuned", "base", "added"):
        assert turned[key]["difference"] == pytest.approx(-plain[key]["difference"])
        assert turned[key]["ci95"] == pytest.approx([-end for end in reversed(plain[key]["ci95"])])
    assert turned["tuned"]["difference"] > 0


def test_easier_training_rows_are_no_overfitting():
    """300 sets: both models do 15 points better on training rows. The gap shows, and training is not blamed."""
    rng, seen, blamed = np.random.default_rng(1), 0, 0
    for _ in range(300):
        found = gauge.gaps(scored(rng, 150, 0.75, 0.85), scored(rng, 150, 0.60, 0.70), 1.0, 0)
        seen += found["tuned"]["ci95"][0] > 0
        blamed += found["added"]["ci95"][0] > 0
    assert seen / 300 > 0.8
    assert blamed / 300 <= 0.04  # one side of 5 %, and a little


def test_a_planted_memory_is_found():
    rng, found = np.random.default_rng(2), 0
    for _ in range(100):
        gaps = gauge.gaps(scored(rng, 200, 0.6, 1.0), scored(rng, 200, 0.6, 0.75), 1.0, 0)
        found += gaps["added"]["ci95"][0] > 0
    assert found >= 95


def test_rows_of_one_source_are_no_surer_than_sources():
    rng = np.random.default_rng(0)
    scores = np.repeat(rng.integers(0, 2, 12), 10).astype(float)
    units = [str(i // 10) for i in range(120)]
    alone, grouped = gauge.mean(scores, None), gauge.mean(scores, units)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    assert gauge.mean(scores, [None] * 120) == alone


# --------------------------------------------------------------------------- models
@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A tiny encoder taught random labels: it can only know them by heart."""
    rows = mood_rows(24, seed=3, name="train")
    rng = np.random.default_rng(0)
    rows = [r | {"label": ["bad", "good"][int(rng.integers(2))]} for r in rows]
    base = classifier(tmp_path_factory.mktemp("over"))
    return sides(
        "text-classification", base, lambda task, loaded: step(task, loaded, rows, lambda n: True, 60, 3e-3),
        training=rows, test=mood_rows(40, seed=9, name="test"), validation=mood_rows(16, seed=8, name="val"),
    )  # fmt: skip


@pytest.fixture
def with_base(learnt):
    baseline = Baseline("base", "the base", lambda rows: learnt.answers(learnt.base, rows))
    return replace(learnt, baseline=baseline)


def test_labels_known_by_heart_are_told(with_base):
    found = gauge.measure(with_base)
    assert [(one["set"], one["n"], one["of"]) for one in found["sets"]] == [
        ("train", 24, 24), ("validation", 16, 16), ("test", 40, 40)]  # fmt: skip
    assert found["sets"][0]["tuned"] > 0.9
    assert found["gaps"]["train"]["tuned"]["ci95"][0] > 0
    assert found["gaps"]["train"]["added"]["difference"] > 0.2
    assert "better on rows it trained on than on held-out ones" in found["sentence"]
    assert gauge.measure(with_base) == found


def test_the_rows_are_drawn_by_their_ids():
    rows = mood_rows(100)
    some = gauge.drawn(rows, 30, 0)
    assert len(some) == 30
    assert {r["row"] for r in gauge.drawn(list(reversed(rows)), 30, 0)} == {r["row"] for r in some}
    assert {r["row"] for r in gauge.drawn(rows, 30, 1)} != {r["row"] for r in some}


def test_what_cannot_be_measured_says_why(with_base):
    with pytest.raises(NotRun, match="left out"):
        gauge.measure(replace(with_base, quick=True))
    with pytest.raises(NotRun, match="8 training rows are fewer than 15"):
        gauge.measure(replace(with_base, training=with_base.training[:8]))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.03, 0.2, "Beyond that, training made a gap of +11.5 points"), (-0.1, 0.2, "is not shown"),
     (-0.2, -0.1, "narrowed")],
)  # fmt: skip
def test_the_sentence_follows_the_interval(low, high, words):
    gap = {"difference": 0.12, "ci95": [0.08, 0.16]}
    added = {"difference": (low + high) / 2, "ci95": [low, high]}
    found = {"metric": "accuracy", "proportion": True, "baseline": "zero-shot",
             "gaps": {"train": {"tuned": gap, "base": gap, "added": added}}}  # fmt: skip
    said = gauge.sentence(found)
    assert words in said
    assert said.startswith(
        "It does 12.0 points better on rows it trained on than on held-out ones (95% interval +8.0 to +16.0)"
    )
    assert "the baseline (zero-shot)" in said
