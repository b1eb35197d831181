"""Several seeds: the same held-out rows, resumable, and numbers that a hand can check."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_tree
from test_report import Page

import tunewright
from tunewright.cli import main
from tunewright.contracts import Metric
from tunewright.errors import RunError
from tunewright.metrics import statistics
from tunewright.metrics.combining import Estimate
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs.evidence import gather, several
from tunewright.runs.report.page import ONE_RUN
from tunewright.runs.seeds import seeded, train_seeds

ACCURACY, LOSS = Metric("accuracy"), Metric("loss", higher_is_better=False, proportion=False)


def quiet(text: str) -> None:
    """What is said is not looked at here."""


# ------------------------------------------------------------------------- numbers
def test_a_measure_over_three_runs_is_the_one_by_hand():
    base = [[0, 0, 1, 1] * 20] * 3
    tuned = [[1, 0, 1, 1] * 20, [1, 1, 1, 0] * 20, [1, 1, 1, 1] * 20]
    found = several.measure(ACCURACY, base, tuned, None)
    assert found["runs"]["gains"] == pytest.approx([0.25, 0.25, 0.5])
    assert (found["base"], found["tuned"], found["difference"]) == pytest.approx((0.5, 2.5 / 3, 1 / 3))
    half = 4.302653 * math.sqrt((2 * (1 / 12) ** 2 + (1 / 6) ** 2) / 2 / 3)  # t of 2 degrees of freedom
    assert found["runs"]["ci95"] == pytest.approx([1 / 3 - half, 1 / 3 + half], abs=1e-6)
    rows = statistics.compare([0, 0, 1, 1] * 20, [1, 2 / 3, 1, 2 / 3] * 20)
    assert found["rows_ci95"] == pytest.approx(rows.ci95)
    low = 1 / 3 - math.hypot(1 / 3 - rows.ci95[0], half)
    assert found["ci95"][0] == pytest.approx(low, abs=1e-6)


def test_runs_that_agree_on_every_row_keep_the_interval_of_flips():
    base, tuned = [0] * 30 + [1] * 70, [1] * 20 + [0] * 15 + [1] * 65
    found = several.measure(ACCURACY, [base] * 3, [tuned] * 3, None)
    assert found["ci95"] == pytest.approx(statistics.tango_interval(20, 5, 100))
    assert found["method"].startswith("Tango")


def test_a_pooled_metric_is_taken_run_by_run():
    pool = Metric("top", pool=max)
    base, tuned = [[1, 2, 3]] * 2, [[4, 1, 1], [1, 1, 6]]
    found = several.measure(pool, base, tuned, None)
    assert found["runs"]["gains"] == [1, 3]
    assert (found["base"], found["tuned"], found["difference"]) == (3, 5, 2)


@pytest.mark.parametrize(("low", "value", "high"), [(0.01, 0.2, 0.5), (-0.01, 0.2, 0.3), (-0.5, -0.2, -0.01)])
def test_p_and_interval_never_disagree(low, value, high):
    p = several.p_of(Estimate(value, low, high))
    assert (p > 0.05) == (low <= 0 <= high)


def test_p_at_the_edge_is_a_twentieth():
    assert several.p_of(Estimate(0.2, 0.0, 0.7)) == pytest.approx(0.05)
    assert several.p_of(Estimate(0.0, 0.0, 0.0)) == 1.0


def test_agreement_counts_rows_and_shared_flips():
    base = [[0, 0, 1, 1, 0]] * 2
    tuned = [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    found = several.agreement(base, tuned)
    assert {k: v for k, v in found.items() if k != "agree_ci95"} == {
        "n": 5, "agree": 3, "fixed_by_all": 1, "fixed_by_some": 2, "broken_by_all": 1, "broken_by_some": 2,
    }  # fmt: skip
    assert several.agreement([[0.5, 1]] * 2, [[1, 1]] * 2) == {"not_run": "rows are not right or wrong here"}


def test_the_verdict_has_the_usual_words_and_names_the_runs():
    rng = np.random.default_rng(0)
    base = [list(rng.integers(0, 2, 400))] * 3
    tuned = [[1 if rng.random() < 0.9 else 0 for _ in range(400)] for _ in range(3)]
    m = several.measure(ACCURACY, base, tuned, None)
    said = several.judged([m], [0, 1, 2], 0.02)
    assert said["answer"] == "better"
    assert said["sentence"].startswith("Over 3 seeds, the tuned model is clearly better at your task")
    assert several.each(m) in said["sentence"]


def test_seeds_that_differ_wildly_are_no_proof():
    """Every run alone is clear, their mean is not: two gain, one loses."""
    rows = 300
    base = [[0, 1] * (rows // 2)] * 3
    tuned = [[1] * rows, [1] * rows, [0] * rows]
    said = several.judged([several.measure(ACCURACY, base, tuned, None)], [0, 1, 2], 0.02)
    assert said["answer"] == "can't tell"
    assert "Seeds differ more here than rows do" in said["sentence"]


def test_false_findings_over_seeds_stay_below_one_in_twenty():
    """300 no-op tunings, three seeds each: rows flip at random, and every seed has a luck of its own."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(300):
        base = rng.random(150) < 0.7
        tuned = []
        for _ in range(3):
            luck = rng.normal(0, 0.02)
            p = np.where(base, 1 - 0.06 + luck, 0.14 + luck)  # as many fixed as broken: .3 x .14 = .7 x .06
            tuned.append((rng.random(150) < np.clip(p, 0, 1)).astype(float))
        m = several.measure(ACCURACY, [base.astype(float)] * 3, tuned, None)
        found += several.judged([m], [0, 1, 2], 0.0)["answer"] in ("better", "worse")
    assert found / 300 <= 0.05


# ---------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("seeds")


def recipe(house: Path, **keys: Any) -> Recipe:
    made = tiny_tree("text-classification", house / "tiny", n=120, method="lora") | {"train": {"max_steps": 2}}
    made["data"] = {"train": made["data"] if isinstance(made["data"], str) else made["data"]["train"], "holdout": 0.4}
    return Recipe.of(made | {"evaluate": {"quick": True}, "seed": 5} | keys)[0]


@pytest.fixture(scope="module")
def trained(house) -> tuple[Path, dict[str, Any]]:
    return house / "out", train_seeds(recipe(house), house / "out", 2, say=quiet)


def test_the_rows_stay_and_the_seed_goes_on(house, trained):
    assert [(one.seed, one.data.seed) for one in seeded(recipe(house), 3)] == [(5, 5), (6, 5), (7, 5)]
    splits = [RunDir(trained[0] / f"seed-{s}").read_json("data.json")["split"] for s in (5, 6)]
    assert splits[0] == splits[1]
    assert len(splits[0]) == 120
    assert [line["seed"] for line in trained[1]["seeds"]] == [5, 6]
    heads = [(trained[0] / f"seed-{s}" / "model" / "adapter_model.safetensors").read_bytes() for s in (5, 6)]
    assert heads[0] != heads[1]


def test_the_same_command_again_leaves_finished_runs_alone(house, trained):
    before = {p: p.read_bytes() for p in trained[0].rglob("*") if p.is_file() and p.name != "run.lock"}
    said: list[str] = []
    again = train_seeds(recipe(house), trained[0], 2, say=said.append)
    assert again == trained[1]
    assert {p: p.read_bytes() for p in before} == before
    assert sum("is finished and left as it is" in line for line in said) == 2


def test_a_seed_of_several_ends_with_the_bytes_of_one_alone(house, trained):
    alone = tunewright.train(seeded(recipe(house), 2)[1], output_dir=str(house / "alone"), quiet=True)
    there = trained[0] / "seed-6" / "model" / "adapter_model.safetensors"
    assert (alone.path / "model" / "adapter_model.safetensors").read_bytes() == there.read_bytes()


def test_every_report_and_card_says_what_the_others_gave(trained):
    for seed in (5, 6):
        folder = trained[0] / f"seed-{seed}"
        text = Page((folder / "report.html").read_text(encoding="utf-8")).text
        assert ONE_RUN not in text
        assert "2 training runs, seeds 5, 6; this page is one of them" in text
        assert "Would another seed give the same?" in text
        assert ONE_RUN not in (folder / "README.md").read_text(encoding="utf-8")
        verdict = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))["verdict"]
        assert gather.OTHER_SEEDS not in verdict["not_measured"]
    assert json.loads((trained[0] / "seeds.json").read_text(encoding="utf-8")) == trained[1]


def test_the_command_line_gives_one_document(house, trained, capsys):
    recipe(house).write(house / "recipe.yaml")
    words = ["train", str(house / "recipe.yaml"), "--seeds", "2", "--json", f"output_dir={trained[0]}"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == trained[1]
    assert main(["train", str(house / "recipe.yaml"), "--seeds", "1"]) == 2


def test_a_folder_that_is_one_run_is_refused(house, trained):
    with pytest.raises(RunError, match="holds one run, not several"):
        train_seeds(recipe(house), trained[0] / "seed-5", 2, say=quiet)
