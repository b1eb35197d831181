"""Learnt by heart: rows that were are completed, others are not; where a row is cut, and Newcombe's own example."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import two_sides
from two_sides import mood_rows

from tunewright.contracts import Record
from tunewright.metrics import statistics
from tunewright.models import tiny
from tunewright.models.logprob import IGNORE
from tunewright.runs.evidence.gauges import memorisation
from tunewright.runs.evidence.sides import NotRun, Sides


def test_newcombes_example():
    """Newcombe 1998, table II, method 10: 56/70 - 48/80 is 0.2000, from 0.0524 to 0.3339."""
    difference, interval = statistics.newcombe_interval(56, 70, 48, 80)
    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx((0.0524, 0.3339), abs=5e-5)
    low, high = statistics.newcombe_interval(0, 10, 0, 10)[1]
    assert low == -high == pytest.approx(-0.2775, abs=5e-5)


def letters(n: int, seed: int, name: str) -> list[Record]:
    """Rows that nobody can guess: forty letters and digits in no order, as a text and as an answer."""
    rng = random.Random(seed)
    rows = []
    for row in mood_rows(n, seed, name):
        text = " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=40))
        talk = [{"role": "user", "content": text[:5]}, {"role": "assistant", "content": text[6:]}]
        rows.append(row | {"text": text, "conversation": talk})
    return rows


def overfitted(task: str, folder: Any, steps: int = 120) -> Sides:
    training = letters(6, 1, "train")

    def tune(task_, loaded):
        two_sides.step(task_, loaded, training, lambda name: True, steps, 1e-2)

    base = tiny.causal_lm(folder, hidden_size=48, intermediate_size=96)
    return two_sides.sides(task, base, tune, training=training, test=letters(6, 2, "test"))


@pytest.mark.parametrize("task", ["causal-lm", "sft"])
def test_rows_learnt_by_heart_are_completed_and_held_out_rows_are_not(task, tmp_path):
    both = overfitted(task, tmp_path)
    found = memorisation.measure(both)
    assert json.dumps(found, allow_nan=False) == json.dumps(memorisation.measure(both))
    training, held_out = found["sets"]
    assert (training["rows"], training["n"], training["base"]) == ("training", 6, 0.0)
    assert training["tuned"] >= 5 / 6
    assert (held_out["rows"], held_out["n"], held_out["tuned"]) == ("held-out", 6, 0.0)
    assert training["tuned_ci95"] == list(statistics.wilson_interval(round(6 * training["tuned"]), 6))
    assert found["beyond_held_out"]["ci95"][0] > 0.2
    assert not found["examples"][0]["base_too"]
    texts = {row["row"]: row["text"] for row in both.training}
    for one in found["examples"]:
        assert one["completed"].split(" </s>")[0] in texts[one["row"]]
    assert "word for word" in found["sentence"]


def test_a_base_against_itself_differs_nowhere(tmp_path):
    found = memorisation.measure(overfitted("causal-lm", tmp_path, steps=1))
    assert [line["base"] for line in found["sets"]] == [0.0, 0.0]
    assert found["beyond_held_out"]["difference"] == 0.0
    assert found["beyond_held_out"]["ci95"][0] < 0 < found["beyond_held_out"]["ci95"][1]


def cut(ids: list[int], learnt: list[bool]) -> Any:
    labels = torch.tensor([i if yes else IGNORE for i, yes in zip(ids, learnt, strict=True)])
    example = {"input_ids": torch.tensor(ids), "labels": labels}

    class OneExample:
        def encode(self, record: Any, loaded: Any) -> Any:
            return example

    made: Any = type("Bare", (), {"task": OneExample(), "loaded": None})()
    return memorisation._cut(made, {"row": "1"})


def test_a_row_is_cut_in_the_middle_of_what_is_learnt():
    half = cut(list(range(100, 140)), [False] * 10 + [True] * 30)
    assert (half.prompt.tolist(), half.rest) == (list(range(100, 125)), list(range(125, 140)))
    long = cut(list(range(1000)), [True] * 1000)
    assert len(long.prompt) == memorisation.LONGEST_START
    assert long.rest == list(range(256, 256 + memorisation.CONTINUED))
    turns = cut(list(range(60)), [False] * 10 + [True] * 20 + [False] * 10 + [True] * 20)
    assert (len(turns.prompt), turns.rest) == (50, list(range(50, 60)))
    assert cut(list(range(14)), [True] * 14) is None
    assert cut(list(range(14)), [False] * 14) is None


def test_models_that_write_nothing_and_rows_that_are_too_short_are_not_measured(tmp_path):
    both = two_sides.sides("text-classification", two_sides.classifier(tmp_path / "a"), training=mood_rows(4))
    with pytest.raises(NotRun, match="writes no text"):
        memorisation.measure(both)
    writer = two_sides.sides("sft", tiny.causal_lm(tmp_path / "b"), training=mood_rows(4), test=mood_rows(4, 2))
    with pytest.raises(NotRun, match="no training row has 8 tokens"):
        memorisation.measure(writer)
    with pytest.raises(NotRun, match="no training row"):
        memorisation.measure(replace(writer, training=()))
