"""`doctor`: its self-tests hold, each can fail, and what it says of the machine and the extras is so."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tunewright import find
from tunewright.cli import main
from tunewright.contracts import Method
from tunewright.engine import checkpoint
from tunewright.models import surgery
from tunewright.uses import doctor, selftests

TASKS, METHODS = find.names("tasks"), find.names("methods")


def test_every_task_and_every_method_is_tested():
    assert [selftests.untestable(task) for task in TASKS] == [""] * len(TASKS)
    assert len(selftests.tests()) == 1 + len(TASKS) + 2 * len(METHODS) >= 9


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_nothing(tmp_path, task):
    measured = selftests.accumulation(task, tmp_path)
    assert measured.ok, measured


@pytest.mark.parametrize("test", [selftests.frozen, selftests.merged])
@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_what_they_promise(tmp_path, method, test):
    measured = test("text-classification", method, tmp_path)
    assert measured.ok, measured
    folds = find.build("methods", method, {}, Method).folds
    assert (measured.value is not None) == (folds or test is selftests.frozen), "what cannot be folded says so"


def test_damage_is_found(tmp_path):
    assert selftests.damage(tmp_path).value == 0


# ------------------------------------------------------------ each of them can fail
def test_the_damage_test_notices_a_checkpoint_that_is_not_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", lambda path, digest: None)
    assert not selftests.damage(tmp_path).ok


def test_the_frozen_test_notices_statistics_that_drift(tmp_path, monkeypatch):
    def careless(model, **kwargs):
        model.train()

    monkeypatch.setattr("tunewright.engine.fit.set_mode", careless)
    assert surgery.set_mode is not careless
    measured = selftests.frozen("image-classification", "head", tmp_path)
    assert not measured.ok, measured


def test_the_merge_test_notices_an_adapter_that_is_dropped(tmp_path, monkeypatch):
    lora = type(find.build("methods", "lora", {}, object))
    monkeypatch.setattr(lora, "merge", lambda self, model: __import__("copy").deepcopy(model).unload())
    measured = selftests.merged("text-classification", "lora", tmp_path)
    assert not measured.ok, measured


def test_the_accumulation_test_notices_a_mean_of_means(tmp_path, monkeypatch):
    from tunewright.contracts import Loss
    from tunewright.models import classifier

    right = classifier.class_loss

    def wrong(logits, batch):
        return Loss({term: total / len(logits) ** 0.5 for term, total in right(logits, batch).totals.items()})

    monkeypatch.setattr(classifier, "class_loss", wrong)
    measured = selftests.accumulation("text-classification", tmp_path)
    assert not measured.ok, measured


# ------------------------------------------------------------------------- the verb
def test_a_failed_self_test_is_an_exit_code_of_one(monkeypatch, capsys):
    bad = selftests.Measured("accumulation, x", 0.5, 1e-5, "difference")
    monkeypatch.setattr(selftests, "run_all", lambda: [bad])
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["selftests"][0]["value"]) == (False, 0.5)
    assert main(["doctor"]) == 1
    assert "FAIL accumulation, x" in capsys.readouterr().out


def test_a_test_that_raises_has_failed_and_the_others_go_on(monkeypatch):
    def broken(folder):
        raise RuntimeError("no luck")

    monkeypatch.setattr(selftests, "tests", lambda: [("a", broken), ("b", selftests.damage)])
    monkeypatch.setattr(find, "names", lambda folder: [])
    found = selftests.run_all()
    assert [m.ok for m in found] == [False, True]
    assert "no luck" in found[0].what


def test_what_is_said_of_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(selftests, "run_all", lambda: [selftests.Measured("x", None, 0, "not tested: why")])
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"][0].isdigit()
    assert found["precision"]["reason"]
    assert found["memory"]["total_bytes"] > 2**28
    assert found["threads"]["count"] >= 1
    assert found["selftests"][0]["tested"] is False
    monkeypatch.setitem(doctor.EXTRAS, "hub", (("no-such-package",), "data sets by hub id"))
    assert main(["doctor"]) == 0
    assert 'extra hub: missing; pip install "tunewright[hub]" brings: data sets by hub id' in capsys.readouterr().out


def test_the_extras_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {name: needs for name, needs in project["optional-dependencies"].items() if name != "dev"}
    assert declared.keys() == doctor.EXTRAS.keys()
    for name, needs in declared.items():
        assert {need.partition(">")[0] for need in needs} == set(doctor.EXTRAS[name][0])
