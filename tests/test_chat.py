"""`chat`: what it streams is what `predict` says; base beside tuned; classifiers answer with label and score."""

from __future__ import annotations

import io
import json

import pytest

from tunewright.cli import main
from tunewright.runs.prediction import open_run, single_record
from tunewright.runs.training import train
from tunewright.uses.chatting import chat, writes

FEW = {"max_steps": 4, "learning_rate": 0.05, "per_device_train_batch_size": 8, "precision": "float32"}
CELLS = [("sft", "lora"), ("sft", "full"), ("causal-lm", "full"), ("text-classification", "lora")]
ASKED = "good sun day a b"


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    made: dict[tuple[str, str], object] = {}

    def make(task: str, method: str):
        if (task, method) not in made:
            recipe = tiny_recipe(task, method=method, train=FEW)
            out = tmp_path_factory.mktemp("runs") / f"{task}-{method}"
            made[task, method] = train(recipe, out, quiet=True, say=lambda text: None).path
        return made[task, method]

    return make


def talk(path, lines, **options):
    shown: list[str] = []
    said: list[str] = []
    found = list(chat(path, lines, write=shown.append, say=said.append, **options))
    return found, shown, said


@pytest.mark.parametrize(("task", "method"), CELLS)
def test_it_says_what_predict_says(run, task, method):
    path = run(task, method)
    predictor = open_run(path)
    expected = predictor([single_record(predictor.task, ASKED)])[0]
    found, shown, _ = talk(path, [ASKED + "\n", "\n", "never asked\n"], max_new_tokens=64)
    assert [f["prompt"] for f in found] == [ASKED]
    assert writes(predictor.model) == (task in ("sft", "causal-lm"))
    if writes(predictor.model):
        text = found[0]["tuned"]["text"]
        assert text
        assert expected["text"].startswith(text)  # predict may write on where the longest answer ends here
        assert text == expected["text"] or task == "causal-lm"
        assert "".join(shown).strip() == text
    else:
        assert found[0]["tuned"]["label"] == expected["label"]
        assert found[0]["tuned"]["score"] == pytest.approx(expected["score"], abs=1e-6)
        assert "".join(shown).split() == [expected["label"], f"{expected['score']:.3f}"]


def test_words_come_one_by_one(run):
    found, shown, _ = talk(run("causal-lm", "full"), [ASKED], max_new_tokens=12)
    assert len(found[0]["tuned"]["text"].split()) > 6
    assert len([piece for piece in shown if piece.strip()]) > 6


def test_the_longest_answer_is_as_asked(run):
    found, _, _ = talk(run("causal-lm", "full"), [ASKED], max_new_tokens=3)
    assert len(found[0]["tuned"]["text"].split()) <= 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_base_answers_beside_it_and_is_the_base(run, method):
    path = run("sft", method)
    found, shown, _ = talk(path, [ASKED], side_by_side=True, max_new_tokens=20)
    assert list(found[0]) == ["prompt", "base", "tuned"]
    assert "".join(shown).startswith("base: ")
    predictor = open_run(path)
    base = predictor.task.load(predictor.recipe.model)
    from dataclasses import replace

    alone = replace(predictor, model=base.model.eval(), loaded=base, task=replace(predictor.task, max_new_tokens=20))
    assert found[0]["base"]["text"] == alone([single_record(alone.task, ASKED)])[0]["text"]


def test_a_base_without_a_head_has_nothing_to_say(run):
    found, _, said = talk(run("text-classification", "lora"), [ASKED], side_by_side=True)
    assert "base" not in found[0]
    assert any("has no answer to show" in text for text in said)


def test_piped_lines_and_json(run, monkeypatch, capsys):
    path = str(run("text-classification", "lora"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED}\nbad rain\n"))
    assert main(["chat", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["prompt"] for f in found] == [ASKED, "bad rain"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED}\n"))
    assert main(["chat", path]) == 0
    assert capsys.readouterr().out.split()[0] in ("good", "bad")
    assert main(["chat", path, "--max-new-tokens", "0"]) == 2


def test_a_line_that_cannot_be_answered_does_not_end_it(tiny_recipe, tmp_path):
    recipe = tiny_recipe("image-classification", method="head")
    path = train(recipe, tmp_path / "run", quiet=True, say=lambda text: None).path
    picture = next((tmp_path_root(recipe)).rglob("*.png"))
    found, _, said = talk(path, ["nowhere.png\n", f"{picture}\n"])
    assert "error" in found[0]
    assert found[1]["tuned"]["label"] in ("red", "blue")
    assert any("no such image" in text for text in said)


def tmp_path_root(recipe):
    from pathlib import Path

    return Path(recipe.data.train)
