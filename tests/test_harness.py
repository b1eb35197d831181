"""The judge judged: false wins on equal models, planted gains found, coverage in simulation, shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest

from tunewright.metrics import statistics
from tunewright.metrics.classification import ACCURACY
from tunewright.runs.evidence import measures
from tunewright.runs.evidence.verdict import verdict
from tunewright.runs.training import train


def pair(rng: np.random.Generator, n: int, rate: float, gain: float, discordant: float) -> tuple[list, list]:
    """Base and tuned right/wrong rows: `discordant` of them differ, `gain` more fixed than broken."""
    fixed, broken = (discordant + gain) / 2, (discordant - gain) / 2
    kinds = rng.choice(4, n, p=[fixed, broken, rate - broken, 1 - rate - fixed])
    return [float(k in (1, 2)) for k in kinds], [float(k in (0, 2)) for k in kinds]


def answer_of(base: list, tuned: list) -> str:
    measure = measures.measure(ACCURACY, base, tuned, None, "base")
    fixed = sum(t > b for b, t in zip(base, tuned, strict=True))
    broken = sum(t < b for b, t in zip(base, tuned, strict=True))
    return verdict(measure, {"fixed": fixed, "broken": broken}, 0.0, [], 0, [])["answer"]


@pytest.mark.promise(12)
def test_equal_models_are_called_better_in_at_most_five_of_a_hundred_comparisons(measured):
    """Two models that are equally good in truth, 200 times, for each of four sizes; margin 0, which is the hardest."""
    rates = {}
    for n in (50, 200, 500, 2000):
        rng = np.random.default_rng(n)
        wins = [answer_of(*pair(rng, n, 0.8, 0.0, 0.13)) for _ in range(200)]
        rates[n] = wins.count("better") / 200
    limit = 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5
    measured(12, value=max(rates.values()), of=800)
    assert max(rates.values()) <= limit, rates


def test_a_model_against_itself_is_never_better():
    rng = np.random.default_rng(0)
    for n in (30, 100, 1000):
        same = [float(x) for x in rng.random(n) < 0.7]
        assert answer_of(same, same) not in ("better", "worse")


def test_a_planted_gain_of_three_points_is_found_in_nine_of_ten():
    rng = np.random.default_rng(1)
    found = [answer_of(*pair(rng, 2000, 0.8, 0.03, 0.13)) for _ in range(200)]
    assert found.count("better") / 200 >= 0.9
    assert found.count("worse") == 0


@pytest.mark.parametrize(("n", "discordant"), [(50, 0.2), (200, 0.13), (1000, 0.1)])
def test_intervals_of_right_and_wrong_cover_the_truth_in_93_to_99_of_a_hundred(n, discordant):
    """Score intervals of counts are allowed to be a little too sure to contain it, never too little."""
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(1000):
        found = statistics.compare(*pair(rng, n, 0.75, 0.04, discordant))
        hits += found.ci95[0] <= 0.04 <= found.ci95[1]
    assert 0.93 <= hits / 1000 <= 0.99


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_intervals_of_means_cover_the_truth_in_93_to_97_of_a_hundred(shape, monkeypatch):
    same = list(statistics._draws(80, 5000, 0))  # every comparison resamples by the same draws: made once, for speed
    monkeypatch.setattr(statistics, "_draws", lambda n, resamples, seed: same)
    monkeypatch.setattr(statistics, "sign_flip_p", lambda *given, **named: 1.0)  # no part of the interval
    rng = np.random.default_rng(11)
    hits, rounds = 0, 1500
    for _ in range(rounds):
        base = rng.normal(2, 1, 80)
        change = rng.exponential(0.5, 80) - 0.5 if shape == "skewed" else rng.normal(0, 0.5, 80)
        low, high = statistics.compare(base.tolist(), (base - 0.3 + change).tolist()).ci95
        hits += low <= -0.3 <= high
    assert 0.93 <= hits / rounds <= 0.97, hits / rounds


def test_a_model_trained_on_shuffled_labels_is_never_better(tiny_recipe, tmp_path):
    """The whole way through training and evidence, on rows whose labels are chance."""
    import csv
    import dataclasses

    rng = np.random.default_rng(3)
    words = [*"abcdefghijklmnop", "sun", "rain", "good", "bad"]
    file = tmp_path / "shuffled.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label"])
        rows = {" ".join(rng.choice(words, 8)) for _ in range(160)}
        writer.writerows([row, ["bad", "good"][rng.integers(2)]] for row in sorted(rows))
    for seed in range(3):
        recipe = tiny_recipe(method="full", train={"num_train_epochs": 3, "learning_rate": 3e-3}, seed=seed)
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train=str(file)))
        run = train(recipe, tmp_path / f"run{seed}", quiet=True, say=lambda text: None)
        assert run.read_json("evidence.json")["verdict"]["answer"] != "better"
