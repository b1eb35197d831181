"""The parts of the page on why and by heart: every number said, data escaped, nothing to run, a small page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_report import Page, image_run, report, text_run

from tunewright.runs.report.page import LIMIT

BAD = '<script>alert("x")</script> & </mark>'


def attribution(pieces: list[str] | None, image: str = "", n: int = 2) -> dict[str, Any]:
    count = len(pieces) if pieces else 49
    lost = [0.0] * (count - 1) + [2.0]
    row = {"row": f"rows:1 {BAD}", "kind": "broken", "input": "a", "truth": "good", "base": "good", "tuned": "bad",
           "rests": {"base": {"lost": [-v for v in lost], "turns": [], "top": None},
                     "tuned": {"lost": lost, "turns": [count - 1], "top": count - 1}}}  # fmt: skip
    row |= {"pieces": pieces} if pieces else {"grid": [7, 7], "image": image}
    return {
        "field": "text", "kind": "text" if pieces else "image", "unit": "log-odds of its answer", "n": n, "of": 30,
        "rows": [row] * n, "baseline": "majority", "sentence": "Looked at: 2 of 30 rows.", "limits": ["Only together."],
        "same_top": {"n": 0, "same": 0, "ci95": None},
    }  # fmt: skip


def influence(flips: int = 2, suspects: int = 3) -> dict[str, Any]:
    train = {"row": "train:7", "input": f"a training row {BAD}", "label": "bad", "answer": "good", "score": 0.9}
    pushed = [train | {"way": "toward", "push": 0.873}, train | {"way": "against", "push": -0.412}]
    flip = {"row": "rows:1", "kind": "broken", "input": f"a test row {BAD}", "base": "good", "tuned": "bad",
            "pushed_by": pushed}  # fmt: skip
    return {
        "how": "last layer", "toward": "the answer that it gave", "n": 500, "of": 800, "flips": [flip] * flips,
        "flipped": 30, "sentence": "For 2 of 30 rows.", "limits": ["Suggested, not proven: only a retrain could."],
        "suspects": {"n": 500, "listed": suspects, "answered_otherwise": 2,
                     "rows": [train | {"agreed": -0.5}] * suspects},
    }  # fmt: skip


def memorisation() -> dict[str, Any]:
    one = {"n": 24, "base": 0.0, "tuned": 0.5, "base_ci95": [0.0, 0.14], "tuned_ci95": [0.31, 0.69],
           "difference": 0.5, "ci95": [0.28, 0.69], "p": 0.0005, "method": "Tango"}  # fmt: skip
    return {
        "tokens": 32, "shortest": 8, "of": 24, "sets": [one | {"rows": "training"}, one | {"rows": "held-out"}],
        "examples": [{"row": "train:1", "given": f"given {BAD}", "completed": "written", "base_too": False}],
        "sentence": "Given the first half.", "limits": ["Only the likeliest."],
    }  # fmt: skip


def planted() -> dict[str, Any]:
    side = {"exposure": 1.37, "ci95": [0.52, 2.22], "first": 0, "first_share": 0.0, "first_ci95": [0.0, 0.32]}
    tuned = {"exposure": 8.12, "ci95": [6.3, 9.94], "first": 5, "first_share": 0.625, "first_ci95": [0.306, 0.863]}
    row = {"row": "canary:1", "owner": f"Anna {BAD}", "code": "012345", "base": {"rank": 417.0, "exposure": 1.26},
           "tuned": {"rank": 1.0, "exposure": 9.97}}  # fmt: skip
    return {
        "planted": 9, "n": 8, "codes": 1000, "most": 9.9658, "chance": 1.4364, "base": side, "tuned": tuned,
        "difference": 6.75, "ci95": [4.9, 8.6], "p": 0.0002, "method": "t", "rows": [row], "left_out": ["1 of 9 cut."],
        "limits": ["A rank among codes."], "sentence": "Of 8 planted secrets.", "seed": 0,
    }  # fmt: skip


def with_gauges(folder: Path, **gauges: Any) -> Path:
    (folder / "gauges").mkdir(exist_ok=True)
    for name, value in gauges.items():
        (folder / "gauges" / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def part(source: str, name: str) -> str:
    start = source.index(f'<details class="part" id="{name}">')
    following = source.find('<details class="part"', start + 1)
    return source[start : following if following > 0 else None]


def test_words_pushes_and_suspects_stand_there_with_their_numbers(tmp_path):
    folder = with_gauges(text_run(tmp_path), attribution=attribution(["not ", f" {BAD}"]), influence=influence())
    source = report(folder)
    page, why = Page(source), Page(part(source, "why"))
    assert page.faults == []
    for said in ("2 rows of 30 that changed sides", "called majority", "tuned: bad", "+2, turns",
                 "suggested, not proven",
                 "500 training rows looked at (of 800)", "▲ toward", "+0.873", "▼ against", "−0.412",
                 "The 3 of 500 training rows", "90.0%", "only a retrain could"):  # fmt: skip
        assert said in why.text, said
    assert BAD in why.text
    assert source.count("<script") == 1  # ours
    assert "<script" not in part(source, "why")
    assert {mark["class"] for mark in why.named("mark")} == {"rests-4", "rests-against"}
    assert "because" not in why.text.lower()
    assert report(folder) == source


def test_regions_stand_over_the_picture_itself(tmp_path):
    folder = image_run(tmp_path)
    Image.new("RGB", (60, 40), (9, 90, 9)).save(folder / "pictures" / "one.png")
    with_gauges(folder, attribution=attribution(None, "pictures/one.png"))
    source = report(folder)
    why = Page(part(source, "why"))
    assert why.faults == []
    drawn = why.named("image")
    assert len(drawn) == 4
    assert all(one["href"].startswith("data:image/jpeg;base64,") for one in drawn)
    assert sum(one.get("class") == "region turns" for one in why.named("rect")) == 2
    assert "row 7, column 7" in why.text
    (folder / "pictures" / "one.png").unlink()
    assert "its file is not there" in Page(part(report(folder), "why")).text


def test_rows_by_heart_are_counted_and_shown(tmp_path):
    source = report(with_gauges(text_run(tmp_path), memorisation=memorisation()))
    heart = Page(part(source, "heart"))
    assert Page(source).faults == []
    for said in ("the next 32 tokens", "training rows (24)", "0% → 50.0%", "+28.0\u00a0to\u00a0+69.0", "< 0.001", BAD):
        assert said in heart.text, said
    assert len(heart.named("svg")) == 1


def test_planted_secrets_stand_there_with_their_ranks(tmp_path):
    source = report(with_gauges(text_run(tmp_path), canaries=planted()))
    heart = Page(part(source, "heart"))
    assert Page(source).faults == []
    figures = (
        "999 others",
        "1.44 on average",
        "1.37 → 8.12 bits",
        "6.3\u00a0to\u00a09.94",
        "62.5%",
        "+6.75 bits",
        "417",
    )
    words = ("Of 8 planted secrets.", "p < 0.001", BAD, "012345", "1 of 9 cut.", "A rank among codes.")
    for said in (*figures, *words):
        assert said in heart.text, said
    assert "not measured" in heart.text  # rows completed word for word
    assert len(heart.named("svg")) == 1


@pytest.mark.parametrize("name", ["attribution", "influence", "memorisation", "canaries"])
def test_what_did_not_run_or_cannot_be_read_is_said(name, tmp_path):
    folder = with_gauges(text_run(tmp_path), **{name: {"not_run": "x < y"}})
    assert "x < y" in Page(report(folder)).text
    with_gauges(folder, **{name: {"sentence": "a", "rows": [1], "flips": 3, "sets": None}})
    source = report(folder)
    assert Page(source).faults == []
    assert "the gauge's file cannot be read" in Page(source).text


def test_the_page_stays_small(tmp_path):
    many = attribution([f"word{i} " for i in range(40)], n=10)
    folder = with_gauges(text_run(tmp_path), attribution=many, influence=influence(20, 40), memorisation=memorisation())
    assert len(report(folder).encode()) <= LIMIT
