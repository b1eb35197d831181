"""What an answer rests on: planted models whose answer one word, or one region, decides; and sums by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image
from test_gauges_groups import sides

from tunewright.contracts import Baseline, Field
from tunewright.metrics import statistics
from tunewright.runs.evidence.gauges import attribution
from tunewright.runs.evidence.sides import NotRun


def answer(yes: float) -> dict[str, Any]:
    label = "yes" if yes >= 0.5 else "no"
    return {"label": label, "score": max(yes, 1 - yes), "scores": {"yes": yes, "no": 1 - yes}}


def planted(rows: list[Any], base: Any, tuned: Any, field: str = "text") -> Any:
    """Sides of models that are functions of a row's value; the truth is always "yes"."""

    def predict(side: Any) -> Any:
        return lambda records: [answer(side(record[field])) for record in records]

    made = sides([{}] * len(rows), [True] * len(rows), [True] * len(rows), baseline=Baseline("base", "", predict(base)))
    test = [r | {field: value} for r, value in zip(made.test, rows, strict=True)]
    made = replace(made, test=test, before=predict(base)(test), after=predict(tuned)(test))
    object.__setattr__(made, "affordable", lambda times, records: 1000)
    object.__setattr__(made, "answers", lambda model, records, validating=False: predict(tuned)(records))
    return made


# ------------------------------------------------------------------------ pieces
@pytest.mark.parametrize("text", ["one", " two  words ", "a b\tc\nd", "x " * 39, "long " * 101 + " end", "é ü 漢字 。"])
def test_pieces_joined_are_the_text_and_are_no_more_than_the_limit(text):
    pieces = attribution.stretches(text)
    assert "".join(pieces) == text
    assert 1 <= len(pieces) <= attribution.MOST_PIECES
    assert all(piece.strip() for piece in pieces)


def test_log_odds_by_hand():
    assert attribution.log_odds(0.5) == 0
    assert attribution.log_odds(0.9) == pytest.approx(math.log(9))
    assert attribution.log_odds(1.0) == pytest.approx(math.log(1e6), abs=1e-5)
    found = attribution._lost([answer(0.9), answer(0.6), answer(0.2), answer(0.95)])
    assert found["lost"] == pytest.approx([math.log(9) - math.log(1.5), math.log(9) + math.log(4), math.log(9 / 19)])
    assert (found["answer"], found["turns"]) == ("yes", [1])


# ------------------------------------------------------------------------ planted models
TEXTS = [f"the {word} number {i} was not late" for i, word in enumerate(["parcel", "letter", "train"] * 5)]


def test_the_one_word_that_decides_is_named_for_each_side():
    found = attribution.measure(
        planted(TEXTS, lambda t: 0.9 if "number" in t else 0.3, lambda t: 0.1 if "not" in t else 0.7)
    )
    assert (found["n"], found["of"], found["kind"]) == (attribution.MOST_FLIPS, 15, "text")
    for row in found["rows"]:
        assert row["kind"] == "broken"
        for side, word in (("base", "number"), ("tuned", "not")):
            rests = row["rests"][side]
            assert row["pieces"][rests["top"]].strip() == word
            assert rests["turns"] == [rests["top"]]
            assert [i for i, lost in enumerate(rests["lost"]) if lost] == rests["turns"]
    interval = list(statistics.wilson_interval(10, 10))
    assert found["turns"]["tuned"] == {"n": 10, "turned": 10, "ci95": interval}
    assert found["same_top"] == {"n": 10, "same": 0, "ci95": list(statistics.wilson_interval(0, 10))}
    assert "In 10 of them one word alone turns" in found["sentence"]
    json.dumps(found, allow_nan=False)


def test_a_base_that_looks_at_nothing_rests_on_nothing():
    found = attribution.measure(planted(TEXTS, lambda t: 0.9, lambda t: 0.1 if "not" in t else 0.7))
    assert {row["rests"]["base"]["top"] for row in found["rows"]} == {None}
    assert found["same_top"]["n"] == 0
    assert "nothing to compare" in found["sentence"]


def test_the_one_region_that_decides_is_named(tmp_path, monkeypatch):
    """The base looks at the upper left, the tuned model at the middle of the lowest row; every region is
    greyed once."""
    paths = []
    for i in range(3):
        picture = Image.new("RGB", (700, 420), (10, 60, 10 * i))
        picture.paste((250, 0, 0), (0, 0, 100, 60))
        picture.paste((0, 0, 250), (300, 360, 400, 420))
        paths.append(str(tmp_path / f"{i}.png"))
        picture.save(paths[-1])

    def looks(x: float, y: float, channel: int, here: float, else_: float) -> Any:
        def side(path: str) -> float:
            with Image.open(path) as picture:
                seen = picture.getpixel((int(x * picture.width), int(y * picture.height)))
            return here if seen[channel] > 200 else else_

        return side

    made = planted(paths, looks(0.5 / 7, 0.5 / 7, 0, 0.8, 0.3), looks(3.5 / 7, 6.5 / 7, 2, 0.1, 0.6), "image")
    monkeypatch.setattr(type(made.task), "fields", {"image": Field("", "image"), "label": Field("", "label")})
    found = attribution.measure(made)
    assert found["n"] == 3
    for row in found["rows"]:
        assert row["grid"] == [7, 7]
        assert (row["rests"]["base"]["top"], row["rests"]["tuned"]["top"]) == (0, 6 * 7 + 3)
        assert (row["rests"]["base"]["turns"], row["rests"]["tuned"]["turns"]) == ([0], [45])
        assert row["image"] in paths
    assert sorted(str(p) for p in tmp_path.iterdir()) == paths


def test_a_picture_that_is_answered_otherwise_once_made_small_is_left_out_and_counted(tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in ("large.png", "small.png")]
    for path, width in zip(paths, (1500, 70), strict=True):
        Image.new("RGB", (width, 70), (250, 0, 0)).save(path)

    def size(path: str) -> tuple[int, int]:
        with Image.open(path) as picture:
            return picture.size

    made = planted(paths, lambda p: 0.9, lambda p: 0.6 if size(p)[0] == attribution.SIDE else 0.2, "image")
    monkeypatch.setattr(type(made.task), "fields", {"image": Field("", "image")})
    found = attribution.measure(made)
    assert (found["n"], found["of"], found["answered_otherwise"]) == (1, 2, 1)
    assert found["rows"][0]["image"] == paths[1]


def test_of_a_conversation_the_last_question_is_taken_apart(tmp_path):
    talk = [{"role": "user", "content": "first words"}, {"role": "assistant", "content": "a"},
            {"role": "user", "content": "second one here"}, {"role": "assistant", "content": "b"}]  # fmt: skip
    made = attribution.OCCLUSIONS["conversation"]({"row": "1", "talk": talk}, "talk", tmp_path)
    assert made is not None
    assert made.facts["pieces"] == ["second", " one", " here"]
    assert [r["talk"][2]["content"] for r in made.without] == ["one here", "second here", "second one"]
    assert all(r["talk"][:2] == talk[:2] and r["talk"][3] == talk[3] for r in made.without)
    assert attribution.OCCLUSIONS["text"]({"row": "1", "text": "alone"}, "text", tmp_path) is None


def test_answers_without_probabilities_are_weighed_by_the_cost_of_the_right_text():
    made = planted(TEXTS[:2], lambda t: 0.9, lambda t: 0.1)
    costs = {"base": {"second": 3.0}, "tuned": {}}

    def ask(model: Any, records: Any, validating: bool = False) -> list[dict[str, Any]]:
        assert validating
        return [{"loss": 1.0 + costs[model].get("second", 0.0) * ("second" not in r["text"])} for r in records]

    made = replace(made, base="base", tuned="tuned", after=[{"text": "a", "loss": 1.0}] * 2)
    object.__setattr__(made, "answers", ask)
    asking = attribution._Asking.of(made)
    assert asking.unit.startswith("nats")
    rows = [{"text": text} for text in ("first second", "second", "first")]
    base, tuned = asking.worth(rows)
    assert base == {"lost": [0.0, 3.0]}
    assert tuned == {"lost": [0.0, 0.0]}


def test_where_the_text_is_also_what_is_predicted_or_nothing_flipped_it_does_not_run(monkeypatch):
    made = planted(TEXTS, lambda t: 0.9, lambda t: 0.1)
    with pytest.raises(NotRun, match="changed sides"):
        attribution.measure(replace(made, after=made.before))
    monkeypatch.setattr(type(made.task), "truth", lambda self, record: None)
    with pytest.raises(NotRun, match="also what is predicted"):
        attribution.measure(made)
