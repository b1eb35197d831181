"""lm-evaluation-harness by name. A stand-in with its answers' form plays its part; the real one, where installed."""

from __future__ import annotations

import json
import sys
import types

import pytest
import two_sides

from tunewright.errors import UserError
from tunewright.metrics import statistics
from tunewright.models import tiny
from tunewright.runs import checking
from tunewright.runs.evidence.gauges import harness
from tunewright.runs.evidence.sides import NotRun


@pytest.fixture
def decoder(tmp_path):
    return tiny.causal_lm(tmp_path / "decoder")


def samples(right, name="acc"):
    return [
        {"doc_id": i, "filter": "none", "doc_hash": f"h{i}", "metrics": [name, "text"], name: r, "text": "said"}
        for i, r in enumerate(right)
    ]


def stand_in(monkeypatch, results):
    """lm_eval as far as the gauge knows it; gives one result after the other."""
    given, asked = iter(results), []

    def simple_evaluate(model, **keys):
        asked.append(keys)
        print("noise that nobody wants")
        return next(given)

    package = types.ModuleType("lm_eval")
    package.simple_evaluate, package.__spec__ = simple_evaluate, types.SimpleNamespace()
    models, inner = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.models.huggingface")
    inner.HFLM = lambda **keys: keys
    for name, module in (("lm_eval", package), ("lm_eval.models", models), ("lm_eval.models.huggingface", inner)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: object())
    return asked


def result(**tasks):
    return {
        "samples": {name: samples(right) for name, right in tasks.items()},
        "higher_is_better": {name: {"acc": True} for name in tasks},
        "n-samples": {name: {"original": 1000, "effective": len(right)} for name, right in tasks.items()},
    }


def test_documents_are_paired_and_all_scores_corrected_together(decoder, monkeypatch, capsys):
    base = result(facts=[1.0] * 30 + [0.0] * 10, sums=[1.0] * 20 + [0.0] * 20)
    tuned = result(facts=[1.0] * 12 + [0.0] * 28, sums=[1.0] * 19 + [0.0] * 21)
    asked = stand_in(monkeypatch, [base, tuned])
    found = harness.measure(two_sides.sides("sft", decoder, harness=("facts", "sums")))
    facts, sums = found["tasks"]
    assert (facts["base"], facts["tuned"], facts["n"], facts["of"]) == (0.75, 0.3, 40, 1000)
    assert facts["ci95"] == list(statistics.tango_interval(0, 18, 40))
    assert facts["p_holm"] == pytest.approx(2 * statistics.mcnemar_midp(0, 18))
    assert sums["p_holm"] > 0.05
    assert found["sentence"] == "Of 2 benchmark scores, 1 became worse (facts acc), Holm's correction included."
    assert all(keys["limit"] == harness.LIMIT and keys["confirm_run_unsafe_code"] is False for keys in asked)
    assert "noise" not in capsys.readouterr().out


def test_only_documents_that_both_answered_are_compared(decoder, monkeypatch):
    base, tuned = result(facts=[1.0] * 20), result(facts=[1.0] * 30)
    stand_in(monkeypatch, [base, tuned])
    found = harness.measure(two_sides.sides("sft", decoder, harness=("facts",)))
    assert [(line["n"], line["difference"]) for line in found["tasks"]] == [(20, 0.0)]
    assert found["sentence"] == "None of 1 benchmark score changed by more than chance would."


def test_nothing_named_nothing_asked(decoder):
    with pytest.raises(NotRun, match="no benchmark named"):
        harness.measure(two_sides.sides("sft", decoder))


def test_a_task_file_that_would_run_code_is_refused(tmp_path):
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text("task: a\ndoc_to_text: !function utils.run\n")
    with pytest.raises(NotRun, match="cannot be read as plain YAML"):
        harness.task(str(hostile))
    assert harness.task("hellaswag") == "hellaswag"


def test_a_missing_harness_and_a_missing_file_are_said_before_training(tiny_recipe, monkeypatch):
    recipe = tiny_recipe("causal-lm", method="full", evaluate={"harness": ["nowhere.yaml"]})
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        checking.prepare(recipe)
    text = error.value.text()
    assert "there is no such task file" in text
    assert "pip install 'tunewright[harness]'" in text


def test_the_real_harness_gives_the_base_against_itself_no_difference(decoder, tmp_path):
    pytest.importorskip("lm_eval")
    lines = [{"q": "the sun", "choices": ["very good", "bad day"], "gold": i % 2} for i in range(20)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = tmp_path / "own.yaml"
    own.write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'docs.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}]\n"
    )
    found = harness.measure(two_sides.sides("sft", decoder, harness=(str(own),)))
    assert [(line["task"], line["n"], line["difference"]) for line in found["tasks"]] == [("own", 20, 0.0)]
    assert found["tasks"][0]["base"] == 0.5
