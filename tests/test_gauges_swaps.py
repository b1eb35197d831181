"""Identity words exchanged: whole words in their case, both ways, and the share of answers that change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_gauges_groups import sides

from tunewright.contracts import Baseline, Field
from tunewright.data.identity_terms import TERMS, exchange
from tunewright.runs.evidence.gauges import swaps
from tunewright.runs.evidence.sides import NotRun


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("He said his brother hurt himself.", "gender", "She said her sister hurt herself."),
        ("I saw her with her dog; it was hers.", "gender", "I saw him with his dog; it was his."),
        ("GIVE HIM A CHANCE, Mr. King", "gender", "GIVE HER A CHANCE, Mrs. Queen"),
        ("The woman there", "gender", "The man there"),
        ("the shepherd and the manor, history", "gender", "the shepherd and the manor, history"),
        ("Anna met Ahmed", "names", "Fatima met Michael"),
        ("anna met chris", "names", "anna met chris"),
        ("the French bread from Turkey, roast turkey", "origin", "the Turkish bread from France, roast turkey"),
        ("A Christian church", "religion", "A Muslim mosque"),
    ],
)
def test_terms_are_exchanged_as_whole_words_in_their_case(text, kind, said):
    assert exchange(text, kind)[0] == said


@pytest.mark.parametrize("kind", list(TERMS))
def test_every_pair_comes_back(kind):
    one_way = {"his", "him", "her", "hers", "ms", "mom"}  # English has fewer forms on one side
    seen = 0
    for term in TERMS[kind].keys() - one_way:
        there, found = exchange(f"so {term} came", kind)
        assert found == [term]
        assert there != f"so {term} came"
        assert exchange(there, kind)[0] == f"so {term} came"
        seen += 1
    assert seen >= 20


def sided(texts: list[str], base: Any, tuned: Any) -> Any:
    def predict(side: Any) -> Any:
        return lambda rows: [{"label": side(r["text"]), "score": 0.9, "scores": {"yes": 0.9, "no": 0.1}} for r in rows]

    n = len(texts)
    made = sides([{}] * n, [True] * n, [True] * n, baseline=Baseline("base", "", predict(base)))
    test = [r | {"text": text} for r, text in zip(made.test, texts, strict=True)]
    made = replace(made, test=test, before=predict(base)(test), after=predict(tuned)(test))
    object.__setattr__(made, "affordable", lambda times, records: 1000)
    object.__setattr__(made, "answers", lambda model, rows, validating=False: predict(tuned)(rows))
    return made


TEXTS = [
    f"{who} paid the bill number {i}" for i, who in enumerate(["He", "She", "The parcel", "Anna", "Mohammed"] * 20)
]


def test_a_model_that_looks_at_gender_is_found_out_and_only_there():
    found = swaps.measure(sided(TEXTS, lambda t: "yes", lambda t: "yes" if "He " in t else "no"))
    assert (found["n"], found["rows"], found["of"]) == (80, 80, 100), "the parcel is nobody"
    by = {line["kind"]: line for line in found["kinds"]}
    assert (by["gender"]["n"], by["gender"]["tuned"], by["gender"]["base"]) == (40, 1.0, 0.0)
    assert (by["names"]["n"], by["names"]["tuned"]) == (40, 0.0)
    assert by["origin"]["n"] == 0
    assert found["difference"] == pytest.approx(0.5)
    assert found["ci95"][0] > 0.3
    assert found["examples"][0]["input"].startswith("He paid")
    assert found["examples"][0]["exchanged"].startswith("She paid")


def test_base_against_base_changes_nothing():
    def side(text: str) -> str:
        return "yes" if len(text) % 2 else "no"

    found = swaps.measure(sided(TEXTS, side, side))
    assert found["difference"] == 0.0
    assert found["base"] == found["tuned"] > 0


def test_rows_whose_right_answer_is_the_term_are_not_counted():
    made = sided(TEXTS, lambda t: "yes", lambda t: "yes")
    test = [r | {"label": "he"} if r["text"].startswith("He") else r for r in made.test]
    made = replace(made, test=test)
    object.__setattr__(made, "affordable", lambda times, records: 1000)
    object.__setattr__(made, "answers", lambda model, rows, validating=False: made.baseline.predict(rows))
    assert swaps.measure(made)["rows"] == 60


def test_without_such_words_it_does_not_run():
    with pytest.raises(NotRun, match="0 held-out rows with such a word"):
        swaps.measure(sided(["the parcel is late"] * 30, lambda t: "yes", lambda t: "yes"))


def test_free_texts_and_pictures_are_not_measured(monkeypatch):
    made = sided(TEXTS, lambda t: "yes", lambda t: "yes")
    with pytest.raises(NotRun, match="free text"):
        swaps.measure(replace(made, after=[{"text": "a"}] * len(made.after)))
    monkeypatch.setattr(type(made.task), "fields", {"image": Field("", "image")})
    with pytest.raises(NotRun, match="no text"):
        swaps.measure(made)
