"""Messy input: edits that change what they say and nothing else, the same for every model; and the gauge over them."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_gauges_groups import sides

from tunewright.contracts import Baseline, Field
from tunewright.data import perturb_images, perturb_text
from tunewright.runs.evidence.gauges import robustness
from tunewright.runs.evidence.sides import NotRun

TEXTS = [
    "My card was charged twice for order 5521, I do not want the second charge: refund 12000 dollars today.",
    "Where is my parcel? The tracking page has said 'in transit' since Monday, 3 May 2021 at 10:45.",
    "I can't get into my account, the reset mail never arrives! It isn't in the spam folder.",
    "They are 1,250,000 units; we will ship 3.5 kg, order #998877, call 555-1234 or 2019-04-01.",
    "überraschend grüne Äpfel für 1.200 Euro",
    "ok",
    "LOUD TEXT WITHOUT END and quiet text with 42",
]
EDITS = list(perturb_text.EDITS)
LETTER_EDITS = ("typos", "missing letters", "repeated letters")


def messy(text: str, edit: str, severity: int, seed: int = 0, keep: Any = ()) -> str:
    return perturb_text.perturb(text, edit, severity, np.random.default_rng(seed), keep)


def many_texts() -> list[str]:
    draw = random.Random(0)
    words = " ".join(TEXTS).split()
    return TEXTS + [" ".join(draw.choices(words, k=draw.randint(1, 40))) for _ in range(60)]


def test_there_are_eight_of_each():
    assert (len(perturb_text.EDITS), len(perturb_images.KINDS)) == (8, 8)


@pytest.mark.parametrize("edit", EDITS)
def test_severity_zero_is_the_text_itself_and_the_same_seed_the_same_mess(edit):
    for text in many_texts():
        assert messy(text, edit, 0) == text
        assert all(messy(text, edit, s, 3) == messy(text, edit, s, 3) for s in perturb_text.SEVERITIES)


@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_ever_changes_a_digit_or_drops_a_word(edit):
    for text, severity, seed in itertools.product(many_texts(), perturb_text.SEVERITIES, range(3)):
        new = messy(text, edit, severity, seed)
        assert re.sub(r"\D", "", new) == re.sub(r"\D", "", text)
        # numbers stay apart: the same runs of digits, but for thousands' commas
        plain = [re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", t)) for t in (text, new)]
        assert plain[0] == plain[1]


def spelt_out(text: str) -> str:
    """Small letters, every contraction in its long form."""
    text = text.lower().replace("’", "'")
    for words, short in perturb_text.CONTRACTIONS.items():
        text = re.sub(rf"\b{short.lower()}\b", words, text)
    return text


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        ("case", str.lower),
        ("spaces", lambda t: t.replace(" ", "")),
        ("punctuation", lambda t: re.sub(r"[.,;:!]", "", t)),
        ("number format", lambda t: t.replace(",", "")),
        ("repeated letters", lambda t: re.sub(r"(.)\1+", r"\1", t)),
        ("typos", lambda t: [len(w) for w in t.split(" ")]),
        ("missing letters", lambda t: len(t.split(" "))),
        ("contractions", lambda t: spelt_out(t)),
    ],
)  # fmt: skip
def test_an_edit_changes_only_what_it_says(edit, same):
    changed = 0
    for text, severity in itertools.product(many_texts(), perturb_text.SEVERITIES):
        new = messy(text, edit, severity)
        changed += new != text
        assert same(new) == same(text)
    assert changed >= 20


def test_protected_words_keep_their_letters():
    keep = frozenset({"refund", "account", "charge"})
    seen = 0
    for text, edit, severity in itertools.product(TEXTS[:3], EDITS, perturb_text.SEVERITIES):
        new = messy(text, edit, severity, keep=keep).lower()
        for word in keep:
            seen += word in text.lower()
            assert len(re.findall(rf"\b{word}\b", new)) == len(re.findall(rf"\b{word}\b", text.lower()))
    assert seen >= 100


def test_a_greater_strength_touches_the_same_places_and_more():
    text = " ".join(TEXTS[:4] * 3)
    made = [messy(text, "case", severity) for severity in perturb_text.SEVERITIES]
    touched = [{i for i, (a, b) in enumerate(zip(text, new, strict=True)) if a != b} for new in made]
    assert all(less < more for less, more in itertools.pairwise(touched))


def test_years_dates_codes_and_decimals_are_no_numbers_to_reformat():
    text = "In 2021, on 2019-04-01 at 10:4500, order #998877, 3.14159, v12345, 0123456 and 12000 or 1,500 of 98765."
    new = messy(text, "number format", 5, seed=1)
    whole = {messy(text, "number format", 5, seed=s) for s in range(30)}
    assert all(part in new for part in ("2021,", "2019-04-01", "#998877", "3.14159", "v12345", "0123456"))
    assert {"12,000" in t for t in whole} == {True, False}
    assert any("1500" in t for t in whole)


# ------------------------------------------------------------------------------ pictures
def picture(seed: int = 0, size: tuple[int, int] = (100, 80)) -> Image.Image:
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grained = np.asarray(patches, dtype=float) + rng.normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(np.clip(grained, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", list(perturb_images.KINDS))
def test_pictures_keep_their_size_and_get_worse_with_strength(kind):
    one = picture()
    clean = np.asarray(one, dtype=float)
    away = []
    for severity in (0, *perturb_images.SEVERITIES):
        made = perturb_images.perturb(one, kind, severity, np.random.default_rng(5))
        again = perturb_images.perturb(one, kind, severity, np.random.default_rng(5))
        assert (made.size, made.mode) == (one.size, "RGB")
        assert made.tobytes() == again.tobytes()
        away.append(float(np.abs(np.asarray(made, dtype=float) - clean).mean()))
    assert away[0] == 0.0
    assert away[1] > 0
    assert all(b >= 0.95 * a for a, b in itertools.pairwise(away))
    assert away[-1] > 1.4 * away[1]


# ----------------------------------------------------------------------------- the gauge
def judged(base: Any, tuned: Any, n: int = 60, **more: Any) -> Any:
    """Sides over made-up texts; a side is a function of the text that says whether it answers right."""
    draw = random.Random(1)
    words = " ".join(TEXTS[:4]).split()
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(n)]

    def predict(side: Any) -> Any:
        return lambda rows: [
            {"label": "yes" if side(r["text"]) else "no", "score": 0.9, "scores": {"yes": 0.9, "no": 0.1}} for r in rows
        ]

    made = sides([{}] * n, [True] * n, [True] * n, baseline=Baseline("base", "", predict(base)))
    test = [r | {"text": text} for r, text in zip(made.test, texts, strict=True)]
    import torch

    made = replace(made, test=test, before=predict(base)(test), after=predict(tuned)(test),
                   tuned=torch.nn.Linear(2, 2), **more)  # fmt: skip
    object.__setattr__(made, "answers", lambda model, rows, validating=False: predict(tuned)(rows))
    object.__setattr__(made.task, "encode", lambda record, loaded: {"length": len(record["text"].split())})
    return made


def test_base_against_base_costs_both_the_same_exactly():
    def fragile(text: str) -> bool:
        return len(text) % 3 > 0

    found = robustness.measure(judged(fragile, fragile))
    assert len(found["severities"]) == 6
    assert len(found["kinds"]) == 8
    for line in (*found["severities"], *(kind for kind in found["kinds"] if kind["n"])):
        assert line["gain"]["difference"] == 0.0
        assert line["beyond_base"]["difference"] == 0.0
        assert line["beyond_base"]["ci95"][0] <= 0 <= line["beyond_base"]["ci95"][1]
        assert line["cost"]["base"]["difference"] == line["cost"]["tuned"]["difference"]
        assert line["base"] == line["tuned"]


def test_the_clean_line_is_the_clean_score_and_costs_nothing():
    made = judged(lambda t: True, lambda t: "card" in t)
    found = robustness.measure(made)
    clean = found["severities"][0]
    assert clean["tuned"] == pytest.approx(np.mean(["card" in r["text"] for r in made.test]))
    assert clean["cost"]["tuned"]["difference"] == 0.0
    assert (found["n"], found["of"]) == (60, 60)


def test_a_model_that_falls_for_capitals_is_found_out():
    """Right as long as no word of three letters or more stands in capitals: only `case` may be named."""

    def hates_capitals(text: str) -> bool:
        return not re.search(r"\b[A-Z]{4,}\b", text)

    found = robustness.measure(judged(lambda t: True, hates_capitals))
    assert found["worst"] == "case"
    case = next(line for line in found["kinds"] if line["kind"] == "case")
    assert case["cost"]["base"]["difference"] == 0.0
    assert case["cost"]["tuned"]["difference"] < -0.5
    others = [line for line in found["kinds"] if line["kind"] != "case" and line["n"]]
    assert all(line["cost"]["tuned"]["difference"] == 0.0 for line in others)
    scores = [line["tuned"] for line in found["severities"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < scores[0]
    assert {line["base"] for line in found["severities"]} == {1.0}


def test_both_sides_get_the_same_messy_rows_whatever_the_other_rows_are():
    asked: list[list[str]] = []

    def remember(rows: Any) -> Any:
        asked.append([r["text"] for r in rows])
        return [{"label": "yes", "score": 1.0, "scores": {"yes": 1.0, "no": 0.0}} for _ in rows]

    made = judged(lambda t: True, lambda t: True)
    made = replace(made, baseline=Baseline("base", "", remember))
    object.__setattr__(made, "answers", lambda model, rows, validating=False: remember(rows))
    robustness.measure(made)
    assert asked[0::2] == asked[1::2]
    assert len(asked) >= 2 * 10
    first = list(asked)
    asked.clear()
    fewer = replace(made, test=made.test[::-1], before=made.before[::-1], after=made.after[::-1])
    object.__setattr__(fewer, "answers", lambda model, rows, validating=False: remember(rows))
    robustness.measure(fewer)
    assert [sorted(one) for one in asked] == [sorted(one) for one in first]


def test_fields_without_a_known_mess_are_not_measured(monkeypatch):
    made = judged(lambda t: True, lambda t: True)
    monkeypatch.setattr(type(made.task), "fields", {"sound": Field("", "audio"), "label": Field("", "label")})
    with pytest.raises(NotRun, match="no mess is known for fields of this kind"):
        robustness.measure(made)


def test_a_text_that_is_its_own_answer_is_not_measured():
    made = judged(lambda t: True, lambda t: True)
    object.__setattr__(made.task, "truth", lambda record: None)
    with pytest.raises(NotRun, match="also what is predicted"):
        robustness.measure(made)


def test_fewer_rows_are_asked_of_a_large_model():
    import torch

    made = judged(lambda t: True, lambda t: True)
    with torch.device("meta"):
        small, large, larger = (torch.nn.Linear(n, n, bias=False) for n in (100, 15_000, 100_000))
    rows = [len(robustness._drawn(replace(made, tuned=model), 13)) for model in (small, large, larger)]
    # 2e12 / (15,000^2 weights x 12 tokens x 13 times) is 56.98
    assert rows == [60, 56, robustness.FEWEST_ROWS]


def test_a_conversation_is_messed_up_in_its_last_question_only(tmp_path: Path):
    turns = [
        {"role": "system", "content": "You are a helpful assistant indeed."},
        {"role": "user", "content": "Please tell me where the parcel went yesterday"},
        {"role": "assistant", "content": "It went to the wrong address somewhere"},
    ]
    rng = np.random.default_rng(0)
    new = robustness._conversation(turns, "typos", 5, rng, (), tmp_path)
    assert [a == b for a, b in zip(turns, new, strict=True)] == [True, False, True]
    assert turns[1]["content"].startswith("Please tell"), "the row itself stays clean"


def test_a_picture_becomes_a_messy_copy_and_stays_as_it_is(tmp_path: Path):
    path = tmp_path / "a.png"
    picture().save(path)
    before = path.read_bytes()
    new = robustness._image(str(path), "noise", 3, np.random.default_rng(0), (), tmp_path)
    assert path.read_bytes() == before
    assert Path(new).parent == tmp_path
    with Image.open(new) as made:
        assert made.size == (100, 80)
