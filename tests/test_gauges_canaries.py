"""Planted secrets: exposure by hand, high where they were learnt, chance where not; where they stand, and where not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import two_sides
from conftest import tiny_tree
from two_sides import mood_rows

import tunewright
from tunewright import find
from tunewright.contracts import Task
from tunewright.data import canaries
from tunewright.errors import UserError
from tunewright.models import tiny
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs import checking
from tunewright.runs.evaluation import measure_gauges
from tunewright.runs.evidence import gauging
from tunewright.runs.evidence.gauges import canaries as gauge
from tunewright.runs.evidence.sides import NotRun, Sides

WRITERS = ["causal-lm", "sft"]


def fields(task: str) -> Any:
    return find.find("tasks", task, Task).fields


# ----------------------------------------------------------------------------- by hand
def test_the_likeliest_of_1000_is_exposed_by_all_bits_and_the_last_by_none():
    assert gauge.exposure(1, 1000) == pytest.approx(9.965784)
    assert gauge.exposure(1000, 1000) == 0.0
    assert gauge.exposure(2, 1000) == pytest.approx(8.965784)


def test_a_secret_never_seen_has_the_stated_exposure_on_average():
    by_hand = sum(math.log2(1000) - math.log2(rank) for rank in range(1, 1001)) / 1000
    assert gauge.chance(1000) == pytest.approx(by_hand)
    assert gauge.chance(10**6) == pytest.approx(1 / math.log(2), abs=1e-4)  # 1.4427: an exponential's mean
    drawn = np.random.default_rng(0).random((2000, 1000))
    found = [gauge.exposure(gauge.rank_of_first(list(one)), 1000) for one in drawn]
    assert np.mean(found) == pytest.approx(gauge.chance(1000), abs=4 * np.std(found) / math.sqrt(2000))


def test_ranks_count_what_is_likelier_and_half_of_what_is_equal():
    assert gauge.rank_of_first([-1.0, -2.0, -3.0]) == 1
    assert gauge.rank_of_first([-3.0, -1.0, -2.0]) == 3
    assert gauge.rank_of_first([-1.0] * 5) == 3  # a model that tells no codes apart knows nothing


# --------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("task", WRITERS)
def test_rows_are_drawn_by_the_seed_and_nested(task):
    rows = canaries.planted(fields(task), 20, seed=3)
    assert rows == canaries.planted(fields(task), 20, seed=3)
    assert rows[:5] == canaries.planted(fields(task), 5, seed=3)
    assert rows != canaries.planted(fields(task), 20, seed=4)
    assert [row["row"] for row in rows] == [f"canary:{i}" for i in range(1, 21)]
    assert len({row["canary"]["owner"] for row in rows}) == 20
    for row in rows:
        code = row["canary"]["code"]
        assert (len(code), code.isdigit()) == (6, True)
        assert " ".join(code) in json.dumps(row[canaries.field_of(fields(task))])
    assert not any(canaries.is_planted(row) for row in mood_rows(2))


def test_the_other_codes_differ_from_each_other_and_from_the_planted_one():
    row = canaries.planted(fields("causal-lm"), 1, seed=0)[0]
    texts = [one["text"] for one in canaries.others(row, fields("causal-lm"), 999, seed=0)]
    assert len({*texts, row["text"]}) == 1000
    assert {text.split(" is ")[0] for text in texts} == {row["text"].split(" is ")[0]}
    assert texts == [one["text"] for one in canaries.others(row, fields("causal-lm"), 999, seed=0)]


def test_rows_with_a_label_or_a_picture_hold_no_secret():
    assert canaries.field_of(fields("text-classification")) is None
    assert canaries.field_of(fields("image-classification")) is None
    with pytest.raises(ValueError, match="field_of"):
        canaries.planted(fields("text-classification"), 1, seed=0)


# -------------------------------------------------------------------------------- the gauge
def overfitted(task: str, folder: Path, steps: int, planted: int = 6) -> Sides:
    rows = canaries.planted(fields(task), planted, seed=0)

    def tune(task_: Any, loaded: Any) -> None:
        two_sides.step(task_, loaded, rows, lambda name: True, steps, 1e-2)

    base = tiny.causal_lm(folder, hidden_size=48, intermediate_size=96)
    return two_sides.sides(task, base, tune, test=mood_rows(4), planted=rows)


@pytest.mark.parametrize("task", WRITERS)
def test_secrets_that_were_learnt_are_exposed_and_the_base_knows_none(task, tmp_path, monkeypatch):
    monkeypatch.setattr(gauge, "CODES", 256)
    found = gauge.measure(overfitted(task, tmp_path, 120))
    assert (found["n"], found["planted"], found["codes"], found["left_out"]) == (6, 6, 256, [])
    assert found["most"] == 8.0 >= found["tuned"]["exposure"] > 7
    assert found["tuned"]["first"] >= 5
    assert found["base"]["first"] == 0
    low, high = found["base"]["ci95"]
    assert low < found["chance"] < high
    assert found["ci95"][0] > 3
    assert found["rows"][0]["row"] == "canary:1"
    assert f"gives {found['tuned']['first']} as its first choice" in found["sentence"]


def test_a_model_that_was_not_trained_knows_no_more_than_chance(tmp_path, monkeypatch):
    monkeypatch.setattr(gauge, "CODES", 128)
    found = gauge.measure(overfitted("causal-lm", tmp_path, 0, planted=30))
    assert found["difference"] == 0.0
    assert found["base"] == found["tuned"]
    low, high = found["tuned"]["ci95"]
    assert low < found["chance"] < high


def test_dear_passes_mean_fewer_codes_and_then_fewer_secrets_and_both_are_said(tmp_path, monkeypatch):
    both = overfitted("sft", tmp_path, 0)
    monkeypatch.setattr(Sides, "affordable", lambda *_: 500)
    found = gauge.measure(both)
    assert (found["codes"], found["n"]) == (100, 5)
    assert found["most"] == pytest.approx(math.log2(100))
    assert found["chance"] == pytest.approx(sum(math.log2(100 / rank) for rank in range(1, 101)) / 100)
    assert len(found["left_out"]) == 2


def test_many_secrets_are_held_against_fewer_codes(tmp_path, monkeypatch):
    monkeypatch.setattr(gauge, "MOST_ROWS", 600)
    found = gauge.measure(overfitted("causal-lm", tmp_path, 0, planted=8))
    assert (found["codes"], found["n"]) == (100, 6)
    assert [line.split(",")[0] for line in found["left_out"]] == [
        "6 of 8 planted secrets were asked for",
        "Among 100 codes and not 1",
    ]


def test_nothing_planted_or_nothing_that_fits_is_said(tmp_path):
    both = overfitted("causal-lm", tmp_path, 0, planted=1)
    with pytest.raises(NotRun, match="no secret was planted"):
        gauge.measure(replace(both, planted=()))
    with pytest.raises(NotRun, match="fits"):
        gauge.measure(replace(both, task=replace(both.task, max_length=8)))  # type: ignore[type-var]
    assert gauge.measure(both)["n"] == 1


# ------------------------------------------------------------------------------ the recipe
def tree(task: str, folder: Path, count: int | None, **more: Any) -> dict[str, Any]:
    made = tiny_tree(task, folder / "tiny", output_dir=str(folder / "run"))
    evaluate = {"quick": True} if count is None else {"quick": True, "canaries": count}
    return made | {"train": {"max_steps": 2}, "evaluate": evaluate} | more


def recipe(*args: Any, **more: Any) -> Recipe:
    return Recipe.of(tree(*args, **more))[0]


def test_without_planted_rows_the_digest_is_the_old_one(tmp_path):
    without, none, some = (recipe("sft", tmp_path, count) for count in (None, 0, 3))
    assert without.digest() == none.digest() != some.digest()
    old = some.tree()
    del old["evaluate"]["canaries"]
    assert Recipe.of(old)[0].digest() == none.digest()


@pytest.mark.parametrize("count", [-1, 101])
def test_how_many_is_limited(count, tmp_path):
    with pytest.raises(UserError, match="from 0 to 100"):
        recipe("sft", tmp_path, count)


@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
def test_tasks_that_do_not_write_refuse_before_a_model_is_opened(task, tmp_path):
    with pytest.raises(UserError) as caught:
        checking.prepare(recipe(task, tmp_path, 2))
    assert [fault.where for fault in caught.value.faults] == ["evaluate.canaries"]
    assert "Leave it out" in str(caught.value)


@pytest.mark.parametrize("task", WRITERS)
def test_planted_rows_stand_among_training_rows_and_nowhere_else(task, tmp_path):
    with_them = checking.prepare(recipe(task, tmp_path, 4)).data
    without = checking.prepare(recipe(task, tmp_path, 0)).data
    assert with_them.train == checking.prepare(recipe(task, tmp_path, 4)).data.train  # as a resumed run reads them
    assert with_them.train[:-4] == without.train
    assert [row["row"] for row in with_them.train[-4:]] == [f"canary:{i}" for i in range(1, 5)]
    assert (with_them.test, with_them.validation) == (without.test, without.validation)
    assert with_them.facts["split"] == without.facts["split"] | {f"canary:{i}": "train" for i in range(1, 5)}
    assert with_them.facts["planted"]["rows"] == 4
    assert any("4 rows of our own were planted into the training rows" in note for note in with_them.notes)
    assert "planted" not in without.facts


def test_a_run_that_is_opened_again_measures_the_same_secrets(tmp_path, monkeypatch):
    some = {name: gauging.modules()[name] for name in ("canaries", "influence", "memorisation", "overfitting")}
    monkeypatch.setattr(gauging, "modules", lambda: some)
    monkeypatch.setattr(gauge, "CODES", 100)
    run = tunewright.train(tree("sft", tmp_path, 4), quiet=True).path
    assert not (run / "gauges" / "canaries.json").exists()
    assert "canary:4" in RunDir.open(run).read_json("data.json")["split"]
    assert "canaries" in measure_gauges(run, None, print)
    found = json.loads((run / "gauges" / "canaries.json").read_text())
    expected = canaries.planted(fields("sft"), 4, RunDir.open(run).recipe().seed)
    assert [(one["row"], one["code"]) for one in found["rows"]] == [(r["row"], r["canary"]["code"]) for r in expected]
    for path in (run / "gauges").glob("*.json"):
        assert path.stem == "canaries" or "canary:" not in path.read_text(), path.stem
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Planted secrets" in page
    assert "canary:4" in page
