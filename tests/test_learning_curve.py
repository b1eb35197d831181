"""Would more data help? Planted curves, nested rows, and a run on fewer of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_tree
from test_report import Page

import tunewright
from tunewright.cli import main
from tunewright.data.split import nested
from tunewright.errors import RunError, UserError
from tunewright.metrics import power_law
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs import learning_curve as lc
from tunewright.runs.report.page import write_report

SIZES = [75, 150, 300, 600]


# ------------------------------------------------------------------------ the fit
def test_a_planted_power_law_is_found_again():
    n = np.array(SIZES, dtype=float)
    planted = 0.08 + 0.9 * n**-0.45
    found = power_law.fit(SIZES, planted[None])
    assert found.kind == "power law"
    assert found.at(1200)[0] == pytest.approx(0.08 + 0.9 * 1200**-0.45, abs=5e-4)
    assert found.a[0] == pytest.approx(0.08, abs=0.01)
    assert found.c[0] == pytest.approx(0.45, abs=0.05)


def test_a_law_without_a_rest_is_kept_above_zero():
    n = np.array(SIZES, dtype=float)
    found = power_law.fit(SIZES, np.stack([2 * n**-0.5, 0.3 - 0.0004 * n]))
    assert (found.a >= 0).all()
    assert (found.b >= 0).all()
    assert found.at(1200)[0] == pytest.approx(2 * 1200**-0.5, abs=1e-3)


def test_an_error_that_rises_is_foreseen_to_stay():
    found = power_law.fit(SIZES, np.array([[0.1, 0.12, 0.14, 0.16]]))
    assert found.at(600)[0] == found.at(1200)[0] == pytest.approx(0.13)


def test_few_sizes_get_a_line_over_log_rows():
    found = power_law.fit([100, 200, 400], np.array([[0.4, 0.3, 0.2]]))
    assert found.kind == "log-linear"
    assert found.at(800)[0] == pytest.approx(0.1)
    assert power_law.fit(SIZES, np.array([[-1.0, -2.0, -3.0, -4.0]]), floor=False).at(1200)[0] == pytest.approx(-5)
    with pytest.raises(ValueError, match="2 sizes or more"):
        power_law.fit([10], np.array([[0.1]]))


# ----------------------------------------------------------------------- the words
def planted(shares, n=2000, seed=0):
    """Right and wrong of the same rows at each size: a row once learnt stays learnt."""
    chance = np.random.default_rng(seed).random(n)
    return {size: {f"r{i}": float(c < s) for i, c in enumerate(chance)} for size, s in zip(SIZES, shares, strict=True)}


def base(n=2000, share=0.5):
    return {f"r{i}": float(i < share * n) for i in range(n)}


def test_a_curve_that_still_rises_says_so_and_holds_what_comes_next():
    n = np.array([*SIZES, 1200.0])
    shares = 1 - (0.05 + 2.5 * n**-0.5)
    found = lc.curve(planted(shares[:4]), base(), True, True)
    low, high = found["doubling"]["ci95"]
    assert low <= shares[4] - shares[3] <= high
    assert found["doubling"]["gain"] == pytest.approx(shares[4] - shares[3], abs=0.01)
    assert found["sentence"].startswith("From 300 to 600 rows it gained ")
    assert "Doubling once more would be expected to add about +" in found["sentence"]
    assert [p["rows"] for p in found["points"]] == SIZES


def test_a_flat_curve_says_that_no_more_gain_can_be_seen():
    found = lc.curve(planted([0.9, 0.9, 0.9, 0.9]), base(), True, True)
    assert "From 300 to 600 rows no more gain can be seen" in found["sentence"]
    assert found["doubling"]["gain"] == pytest.approx(0, abs=1e-6)


def test_a_curve_that_jumps_foresees_nothing():
    found = lc.curve(planted([0.5, 0.5, 0.51, 0.83]), base(), True, True)
    assert "cannot be foreseen" in found["sentence"]
    assert "gain" not in found["doubling"]


def test_a_loss_that_falls_is_a_gain():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 500)
    scores = {
        size: {f"r{i}": float(v) for i, v in enumerate(level + noise)}
        for size, level in zip(SIZES, (2.0, 1.6, 1.35, 1.2), strict=True)
    }
    found = lc.curve(scores, {f"r{i}": 3.0 for i in range(500)}, False, False)
    assert found["steps"][-1]["difference"] == pytest.approx(-0.15)
    assert "it gained 0.15 (" in found["sentence"]
    assert found["doubling"]["gain"] > 0


def test_other_rows_are_refused():
    with pytest.raises(RunError, match="other held-out rows"):
        lc.curve(planted([0.5, 0.6, 0.7, 0.8]), base(n=1999), True, True)


def test_the_interval_of_what_comes_next_holds_it(monkeypatch):
    """60 planted curves, each size trained with luck of its own (half a point)."""
    monkeypatch.setattr(lc, "DRAWS", 200)
    rng, held, told = np.random.default_rng(3), 0, 0
    n = np.array([*SIZES, 1200.0])
    truth = 1 - (0.05 + 2.0 * n**-0.5)
    for run in range(60):
        shares = truth[:4] + rng.normal(0, 0.005, 4)
        found = lc.curve(planted(shares, n=400, seed=run), base(400), True, True)["doubling"]
        if "gain" in found:
            told += 1
            held += found["ci95"][0] <= truth[4] - truth[3] <= found["ci95"][1]
    assert told >= 50
    assert held / told >= 0.85


# ------------------------------------------------------------------------- the rows
def records(n=90):
    return [{"row": f"f:{i}", "label": "abc"[i % 3 if i % 5 else 0], "doc": str(i // 9)} for i in range(n)]


def test_fewer_rows_are_always_among_more_and_keep_the_shares():
    rows = records()
    whole = Counter(r["label"] for r in rows)
    before: set[str] = set()
    for count in (3, 10, 30, 60, 90):
        kept = nested(rows, count, seed=1, stratify=lambda r: r["label"])
        names = {r["row"] for r in kept}
        assert len(names) == count
        assert before <= names
        assert [r for r in rows if r["row"] in names] == kept  # in the given order
        for label, size in Counter(r["label"] for r in kept).items():
            assert abs(size - count * whole[label] / 90) <= 1
        before = names
    assert {r["row"] for r in nested(list(reversed(rows)), 30, seed=1)} == {r["row"] for r in nested(rows, 30, seed=1)}
    assert nested(rows, 30, seed=1) != nested(rows, 30, seed=2)


def test_few_rows_of_grouped_data_are_few_groups():
    kept = nested(records(), 18, seed=0, group=lambda r: r["doc"])
    assert len({r["doc"] for r in kept}) == 2


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("curve")


def tree(house: Path, name: str, **train):
    made = tiny_tree("text-classification", house / "tiny", n=150, method="lora", output_dir=str(house / name))
    rows = made["data"] if isinstance(made["data"], str) else made["data"]["train"]
    return made | {"data": {"train": rows, "holdout": 0.2}, "train": {"max_steps": 8} | train}


@pytest.fixture(scope="module")
def finished(house) -> Path:
    return tunewright.train(tree(house, "run"), quiet=True).path


def test_a_limit_takes_training_rows_only_and_says_how_many(house, finished):
    part = tree(house, "part")
    part["data"] |= {"limit": 30}
    found = tunewright.check(part)
    assert found["rows"] == {"train": 30, "validation": 0, "test": 30}
    assert any("30 of 120 training rows used (data.limit" in note for note in found["notes"])
    part["data"]["limit"] = 1
    with pytest.raises(UserError, match=r"data\.limit"):
        tunewright.check(part)


def test_keys_that_are_not_given_leave_the_digest_as_it_was(house):
    given = Recipe.of(tree(house, "x"))[0]
    assert "limit" in given.tree()["data"]
    with_limit = tree(house, "x")
    with_limit["data"] |= {"limit": 30}
    assert Recipe.of(with_limit)[0].digest() != given.digest()


def test_steps_shrink_with_the_rows(house):
    small = lc.smaller(Recipe.of(tree(house, "x", warmup_steps=4))[0], 30, 120)
    assert (small.train.max_steps, small.train.warmup_steps, small.data.limit) == (2, 1.0, 30)
    passes = lc.smaller(Recipe.of(tree(house, "x", max_steps=None, num_train_epochs=2))[0], 30, 120)
    assert (passes.train.max_steps, passes.train.num_train_epochs) == (None, 2)


def test_what_it_takes_is_said_and_too_few_rows_are_refused():
    assert lc.sizes(600, 2, Path("x")) == ([75, 150, 300], [])
    assert lc.sizes(120, 2, Path("x")) == ([30, 60], [15])
    with pytest.raises(RunError, match="half of 30"):
        lc.sizes(30, 2, Path("x"))
    said = lc.announced([75, 150, 300], 600, 100.0, [])
    assert "about 88 s in steps (0.875 times the run's own 100 s)" in said[0]
    assert lc.announced([30], 60, 1.0, [8]) != lc.announced([30], 60, 1.0, [])


def test_a_run_gets_its_curve_and_the_report_shows_it(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert "not measured: `tunewright evaluate RUN --learning-curve`" in (run / "report.html").read_text()
    said: list[str] = []
    found = lc.learning_curve(run, None, said.append)
    assert sorted(p.name for p in (run / "curve").iterdir()) == ["30", "60"]
    assert found["left_out"] == [15]
    for size in (30, 60):
        small = RunDir(run / "curve" / str(size))
        assert Counter(small.read_json("data.json")["split"].values()) == {"train": size, "test": 30}
    own = {row for row, name in RunDir(run).read_json("data.json")["split"].items() if name == "test"}
    there = {row for row, name in small.read_json("data.json")["split"].items() if name == "test"}
    assert own == there
    assert [p["rows"] for p in found["points"]] == [30, 60, 120]
    assert found["fit"]["kind"] == "log-linear"
    kept = RunDir(run).read_json("learning_curve.json")
    assert kept == json.loads(json.dumps(found))
    text = Page((run / "report.html").read_text(encoding="utf-8")).text.replace("\u00a0", " ")
    assert "Would more data help?" in text
    assert "From 60 to 120 rows" in text
    said.clear()
    assert lc.learning_curve(run, None, said.append)["points"] == found["points"]
    assert sum("is finished and left as it is" in line for line in said) == 2
    assert main(["evaluate", str(run), "--learning-curve", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sentence"] == found["sentence"]
    assert main(["evaluate", str(run), "rows.csv", "--learning-curve"]) == 2
    before = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == before
