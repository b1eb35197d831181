"""The runner of the gauges: found by their files, kept, settled in the verdict; and their parts of the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_tree
from test_report import Page

import tunewright
from tunewright import find
from tunewright.contracts import Task
from tunewright.errors import RunError
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs.evidence import gather, gauging
from tunewright.runs.evidence.sides import NotRun
from tunewright.runs.report.page import LIMIT, write_report

OURS = {"groups", "swaps", "calibration", "robustness", "overfitting"}


def told(path: Path) -> Path:
    """A CSV of moods with the columns that groups are made of, and words that name somebody."""
    import csv
    import random

    rng = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "region", "id"])
        for i in range(150):
            mood = ["bad", "good"][i % 2]
            who = rng.choice(["he", "she", "Anna", "the man", "they"])
            said = " ".join(rng.choices({"bad": ["rain", "night", "bad"], "good": ["sun", "day", "good"]}[mood], k=5))
            writer.writerow([f"{who} said {said} number {i} .", mood, rng.choice(["north", "south"]), i])
    return path


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gauges")


def tree(house: Path, name: str, **evaluate: Any) -> dict[str, Any]:
    made = tiny_tree("text-classification", house / "tiny", method="lora", output_dir=str(house / name))
    rows = house / "told.csv"
    data = {"train": str(rows if rows.exists() else told(rows)), "holdout": 0.4, "columns": {"text": "text"}}
    return made | {"data": data, "train": {"max_steps": 3}, "evaluate": evaluate}


@pytest.fixture(scope="module")
def finished(house) -> Path:
    return tunewright.train(tree(house, "full", groups=["region"]), quiet=True).path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def gauge(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "gauges" / f"{name}.json").read_text(encoding="utf-8"))


def not_measured(run: Path) -> list[str]:
    return json.loads((run / "evidence.json").read_text(encoding="utf-8"))["verdict"]["not_measured"]


# ------------------------------------------------------------------------- running
def test_training_leaves_one_file_for_every_gauge(finished):
    assert set(gauging.modules()) >= OURS
    assert {path.stem for path in (finished / "gauges").glob("*.json")} == set(gauging.modules())
    assert not list((finished / "gauges").glob("*.partial"))
    for name in OURS:
        assert "seconds" in gauge(finished, name), gauge(finished, name)
    groups = gauge(finished, "groups")["columns"][0]["groups"]
    assert sum(group["n"] for group in groups) == gauge(finished, "groups")["n"] == 60


@pytest.mark.parametrize("task", find.names("tasks"))
def test_no_gauge_fails_at_any_task(task, tmp_path):
    """What does not apply says why; a failure would say `it failed`."""
    made = tiny_tree(task, tmp_path / "tiny", output_dir=str(tmp_path / "run"), evaluate={})
    made |= {"train": {"max_steps": 1}}
    path = tunewright.train(made, quiet=True).path
    reasons = {name: gauge(path, name).get("not_run", "") for name in gauging.modules()}
    assert not any(reason.startswith(gauging.FAILED) for reason in reasons.values()), reasons
    assert reasons["groups"] == "no column named: evaluate.groups"
    kinds = {field.kind for field in find.find("tasks", task, Task).fields.values()}
    if "label" in kinds or "conversation" in kinds:
        assert reasons["robustness"] == ""
        found = gauge(path, "robustness")
        assert found["kind"] in kinds
        assert [line["severity"] for line in found["severities"]] == [0, 1, 2, 3, 4, 5]
    assert "not measured: no column named" in (path / "report.html").read_text(encoding="utf-8")


def test_what_was_measured_is_no_longer_called_not_measured(finished):
    said = not_measured(finished)
    assert gather.GAUGED not in said
    assert not any("messy" in line or "groups" in line or "confidence" in line for line in said)
    assert any("other seeds" in line for line in said)


def test_the_same_measurement_gives_the_same_numbers(run):
    kept = {name: gauge(run, name) for name in OURS | {"influence", "attribution", "memorisation"}}
    shutil.rmtree(run / "gauges")
    assert {p.stem for p in (run / "gauges").glob("*")} == set()
    from tunewright.runs.evaluation import measure_gauges

    measured = set(measure_gauges(run, None, print))
    assert {p.stem for p in (run / "gauges").glob("*")} == set(gauging.modules())
    assert measured == {name for name in gauging.modules() if "not_run" not in gauge(run, name)} >= {"groups"}
    for name, before in kept.items():
        assert {k: v for k, v in gauge(run, name).items() if k != "seconds"} == {
            k: v for k, v in before.items() if k != "seconds"
        }


def test_a_whole_model_that_is_opened_again_is_held_against_the_same_baseline(house):
    """The base has no head for these labels, which a finished whole model no longer shows."""
    path = tunewright.train(tree(house, "whole") | {"method": "full"}, quiet=True).path
    kept = {name: gauge(path, name) for name in gauging.modules()}
    assert json.loads((path / "evidence.json").read_text())["baseline"]["name"] != "base"
    shutil.rmtree(path / "gauges")
    from tunewright.runs.evaluation import measure_gauges

    measure_gauges(path, None, print)
    for name, before in kept.items():
        again = gauge(path, name)
        assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}


def test_quick_leaves_out_what_asks_the_models_again_and_the_command_measures_it_later(house, cli, tmp_path):
    path = tunewright.train(tree(house, "quick", groups=["region"], quick=True), quiet=True).path
    there = {p.stem for p in (path / "gauges").glob("*.json")}
    assert {"groups", "calibration"} <= there
    assert not {"robustness", "swaps"} & there
    assert any(line.startswith("messy input (") and "--gauges" in line for line in not_measured(path))
    page = (path / "report.html").read_text()
    assert "gauges/robustness.json; <code>tunewright evaluate RUN --gauges</code> measures it" in page
    before = (path / "gauges" / "groups.json").stat().st_mtime_ns
    code, _, err = cli("evaluate", path, "--gauges")
    assert code == 0, err
    assert "robustness" in err
    assert "severities" in gauge(path, "robustness")
    assert (path / "gauges" / "groups.json").stat().st_mtime_ns == before, "what was measured is kept"
    assert not any("messy" in line for line in not_measured(path))
    assert "In the strongest mess" in (path / "report.html").read_text()
    assert "nothing was left" in cli("evaluate", path, "--gauges")[2]


def test_a_run_that_was_interrupted_while_gauging_goes_on_with_what_is_missing(house):
    keys = tree(house, "interrupted", groups=["region"])
    path = tunewright.train(keys, quiet=True).path
    whole = gauge(path, "robustness")
    (path / "README.md").unlink()
    (path / "gauges" / "robustness.json").unlink()
    (path / "gauges" / "swaps.json.partial").write_text("{")
    before = (path / "gauges" / "groups.json").stat().st_mtime_ns
    tunewright.train(keys, quiet=True)
    assert {k: v for k, v in gauge(path, "robustness").items() if k != "seconds"} == {
        k: v for k, v in whole.items() if k != "seconds"
    }
    assert (path / "gauges" / "groups.json").stat().st_mtime_ns == before
    assert (path / "README.md").is_file()


def ground_of(run: Path) -> Any:
    sides = SimpleNamespace()
    return SimpleNamespace(run=RunDir(run), sides=lambda quick: sides)


def test_a_gauge_that_fails_or_cannot_run_stops_nothing(run, monkeypatch):
    def fails(sides: Any) -> dict[str, Any]:
        raise ZeroDivisionError("division by zero")

    def cannot(sides: Any) -> dict[str, Any]:
        raise NotRun("there is no moon tonight")

    made = {
        "broken": SimpleNamespace(measure=fails, ABOUT="the tide"),
        "moon": SimpleNamespace(measure=cannot),
        "endless": SimpleNamespace(measure=lambda sides: {"value": float("nan")}),
        "fine": SimpleNamespace(measure=lambda sides: {"value": 3}, ABOUT="the sea"),
    }
    monkeypatch.setattr(gauging, "modules", lambda: made)
    said: list[str] = []
    ground = ground_of(run)
    assert gauging.measure_missing(ground, said.append, quick=False) == list(made)
    assert gauge(run, "broken") == {"not_run": "it failed: ZeroDivisionError: division by zero"}
    assert gauge(run, "moon") == {"not_run": "there is no moon tonight"}
    assert gauge(run, "endless")["not_run"].startswith("it failed: ValueError")
    assert gauge(run, "fine")["value"] == 3
    assert said[0] == "the tide was not measured: ZeroDivisionError: division by zero"
    assert len(said) == 2
    lines = not_measured(run)
    assert "moon (there is no moon tonight)" in lines
    assert any(line.startswith("the tide (it failed") for line in lines)
    assert not any(line.startswith("the sea") for line in lines)
    # what is there stays; what could not be measured is tried again only when asked
    assert gauging.measure_missing(ground, said.append, quick=False) == []
    assert gauging.measure_missing(ground, said.append, quick=False, again=True) == ["broken", "moon", "endless"]


def test_a_half_written_file_counts_as_absent(run):
    (run / "gauges" / "groups.json").write_text('{"metric": "accu')
    from tunewright.runs.evaluation import measure_gauges

    assert measure_gauges(run, None, print) == ["groups"]
    assert gauge(run, "groups")["metric"] == "accuracy"


def test_on_several_processes_no_model_is_asked(run, monkeypatch):
    for path in (run / "gauges").glob("*.json"):
        path.unlink()
    made = {
        "asks": SimpleNamespace(measure=lambda sides: {}, PASSES=True),
        "reads": SimpleNamespace(measure=lambda sides: {"n": 1}),
    }
    monkeypatch.setattr(gauging, "modules", lambda: made)
    monkeypatch.setattr(gauging.distributed, "size", lambda: 2)
    assert gauging.measure_missing(ground_of(run), print, quick=False) == ["reads"]


def test_other_rows_than_those_that_were_answered_are_refused(run, house):
    lines = (run / "predictions.jsonl").read_text().splitlines()
    (run / "predictions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (run / "gauges" / "groups.json").unlink()
    from tunewright.runs.evaluation import measure_gauges

    with pytest.raises(RunError, match="other rows than the data does now"):
        measure_gauges(run, None, print)


def test_the_base_as_a_baseline_answers_any_rows(house):
    """Not the test rows alone: messy rows are others."""
    from tunewright.runs import checking

    keys = tree(house, "x")
    prepared = checking.prepare(Recipe.of(keys)[0])
    task, loaded = checking.load(prepared)
    base = gather.BaseModel(task, prepared.recipe.model, loaded.labels, 8)
    rows = prepared.data.test
    whole, part = base(rows), base(rows[3:7])
    assert [a["label"] for a in part] == [a["label"] for a in whole[3:7]]
    assert base([]) == []


# -------------------------------------------------------------------------- recipe
def test_groups_and_quick_are_no_other_experiment(house):
    digests = {
        Recipe.of({k: v for k, v in tree(house, "x", **keys).items() if k != "output_dir"})[0].digest()
        for keys in ({}, {"groups": ["region"]}, {"quick": True}, {"groups": ["region", "id"], "quick": True})
    }
    assert len(digests) == 1
    other = Recipe.of(tree(house, "x", margin=0.05))[0].digest()
    assert other not in digests


def test_a_column_that_is_not_there_is_a_fault_before_training(house):
    with pytest.raises(tunewright.errors.UserError, match=r'there is no column "regoin".*Did you mean "region"'):
        tunewright.check(tree(house, "x", groups=["regoin"]))


# -------------------------------------------------------------------------- report
def test_each_part_has_figures_with_sentence_and_table(finished):
    source = (finished / "report.html").read_text(encoding="utf-8")
    for part, least in (("whom", 2), ("messy", 2), ("confidence", 2)):
        start = source.index(f'<details class="part" id="{part}"')
        body = source[start : source.index('<details class="part"', start + 1)]
        figures = re.findall(r"<figure>.*?</figure>", body, flags=re.DOTALL)
        assert len(figures) >= least, part
        for figure in figures:
            assert re.search(r"<figcaption>[^<]{20,}[.]</figcaption>", figure)
            assert "<svg" in figure
            assert "<table>" in figure
            assert re.search(r"<svg[^>]*><title>", figure)
        assert "nan" not in body.lower().replace("not-an", "")
        assert not re.search(r"significant|forgot|because", body)
    assert len(source.encode()) < LIMIT
    assert Page(source).faults == []


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.03, 0.1, "Mess at strength 5 costs the tuned model less than it costs the base"),
        (-0.1, -0.03, "Mess at strength 5 costs the tuned model more than it costs the base"),
        (-0.1, 0.1, "What mess at strength 5 costs is not shown to differ between tuned model and base"),
    ],
)
def test_what_mess_costs_beyond_the_base_is_said_by_its_interval(run, low, high, said):
    found = gauge(run, "robustness")
    found["severities"][-1]["beyond_base"] |= {"difference": (low + high) / 2, "ci95": [low, high]}
    (run / "gauges" / "robustness.json").write_text(json.dumps(found))
    assert said in write_report(run).read_text(encoding="utf-8")


def planted(run: Path, **more: Any) -> str:
    """The sentence of "For whom?" when the first group is as told."""
    found = gauge(run, "groups")
    found["columns"][0]["groups"][0] |= {"value": "north", "few": False, "changed": "", "stands": ""} | more
    (run / "gauges" / "groups.json").write_text(json.dumps(found))
    source = write_report(run).read_text(encoding="utf-8")
    return re.findall(r'<h2>For whom.</h2><span class="said" dir="auto">(.*?)</span>', source, flags=re.DOTALL)[0]


def test_for_whom_is_said_in_words_fixed_before(run):
    assert "No group is shown to do worse than the others, or to have got worse (2 groups" in planted(run)
    assert "does worse for region north than for the other rows." in planted(run, stands="worse")
    assert "It got worse for region north." in planted(run, changed="worse")


def test_the_page_is_the_same_bytes_again(run):
    before = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == before


def test_where_a_gauge_did_not_run_its_part_says_why(run):
    for name in ("groups", "swaps", "robustness", "calibration"):
        (run / "gauges" / f"{name}.json").write_text(json.dumps({"not_run": f"no {name} <tonight>"}))
    source = write_report(run).read_text(encoding="utf-8")
    for name in ("groups", "swaps", "robustness", "calibration"):
        assert f"not measured: no {name} &lt;tonight&gt;" in source
    shutil.rmtree(run / "gauges")
    assert "the run folder has no gauges/robustness.json" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", [{}, {"columns": [{}], "kinds": 3, "severities": [1, {}], "base": [], "n": "x"}])
def test_a_file_of_another_shape_still_makes_a_page(run, damage):
    for name in OURS:
        (run / "gauges" / f"{name}.json").write_text(json.dumps(damage))
    assert "For whom?" in write_report(run).read_text(encoding="utf-8")


def test_forty_groups_and_hostile_names_stay_small_and_harmless(run):
    found = gauge(run, "groups")
    one = found["columns"][0]["groups"][0]
    groups = [one | {"value": f"<script>alert({i})</script>" + "x" * 200, "tuned": i / 40} for i in range(40)]
    found["columns"] = [found["columns"][0] | {"groups": groups, "column": f'col"{c}<b>'} for c in range(20)]
    (run / "gauges" / "groups.json").write_text(json.dumps(found))
    source = write_report(run).read_text(encoding="utf-8")
    assert source.count("<script") == 1  # ours
    assert len(source.encode()) < LIMIT
    assert "16 of 40 are drawn" in source
