"""The parts of the page on what changed inside and what was lost: every number said, in words, and nothing to run."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from tunewright.runs.report import inside

VOID = {"rect", "line", "circle", "br"}


class Read(HTMLParser):
    """Elements, text, and whether they nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(name)
        self.handle_startendtag(name, attributes)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(name)
        self.attributes += attributes

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data


def effect(difference: float, low: float, high: float, finding: str = "unclear", **more: Any) -> dict[str, Any]:
    return {
        "difference": difference,
        "ci95": [low, high],
        "n": 200,
        "p": 0.01,
        "p_holm": 0.03,
        "finding": finding,
    } | more


def changed() -> dict[str, Any]:
    moved = {"relative_norm": 0.031, "effective_rank": 2.5, "of_rank": 384}
    return {
        "metric": {"name": "accuracy", "higher_is_better": True, "proportion": True},
        "rows": {"n": 200, "of": 500, "seed": 0},
        "parts": [
            {"name": "embedding", "kind": "embedding", "moved": {"relative_norm": 0.0}},
            {"name": "block 1 <b>", "kind": "block", "moved": moved | {"relative_norm": 0.4},
             "needs": effect(0.0, -0.02, 0.02), "alone": effect(0.0, -0.01, 0.01)},
            {"name": "block 2", "kind": "block", "moved": moved, "needs": effect(0.31, 0.22, 0.39, "helps"),
             "alone": effect(0.29, 0.2, 0.38, "helps")},
        ],
        "sweep": [
            {"strength": s, "value": 0.6 + s / 3, "against_full": effect(s / 3 - 0.3, s / 3 - 0.35, s / 3 - 0.25),
             "kept": {"name": "general questions", "value": 0.7, **effect(0.02, 0.01, 0.04)}}
            for s in (0.0, 0.75, 1.0)
        ],
        "recommended": {"strength": 0.75, "why": "skills <i>", "command": "tunewright merge runs/a --base-share 0.25"},
        "sentence": "The result needs block 2 most: it loses 31.0 points.",
        "limits": ["Parts work together."],
    }  # fmt: skip


def probe() -> dict[str, Any]:
    one = {"n": 60, "base": 0.8, "tuned": 0.7, "difference": -0.1, "ci95": [-0.2, 0.01], "broken": 9, "fixed": 3,
           "kept_right": 39, "still_wrong": 9}  # fmt: skip
    return one | {"by_kind": [one | {"kind": "fact"}], "chance": 0.25, "above_chance": {"base": 0.73, "tuned": 0.6},
                  "sentence": "Of 60 general questions it broke 9 and fixed 3."}  # fmt: skip


def divergence() -> dict[str, Any]:
    entry = {
        "on": "neutral texts",
        "unit": "nats a token",
        "n": 200,
        "ci95": [0.03, 0.05],
        "floor": 0.0,
        "method": "BCa",
    }
    return {
        "gauges": [
            entry | {"name": "KL on neutral texts", "value": 0.04},
            entry | {"name": "change of the last layer", "unit": "of 1", "value": 0.2, "ci95": [0.1, 0.3]},
            {"name": "KL of the answers", "on": "rows", "not_run": "the base had no head"},
        ],
        "limits": ["No number here is a threshold."],
    }


def refusals() -> dict[str, Any]:
    line = {"n": 40, "base": 0.8, "tuned": 0.3, "ci95": [-0.64, -0.3], "base_says_nothing": 0.0,
            "tuned_says_nothing": 0.05}  # fmt: skip
    asked = {"request": "Open <b>my</b> door.", "kind": "harmful", "base": "I cannot help.", "tuned": "word " * 99}
    return {
        "kinds": [line | {"kind": "harmful"}, line | {"kind": "harmless", "base": 0.1, "tuned": 0.05}],
        "changed": [asked | {"base_refused": True, "tuned_refused": False}],
        "sentence": "Of 40 harmful requests it refused 12, the base 32.",
    }


def test_refusals_stand_there_with_the_requests_on_which_both_differ():
    page = Read(inside.lost(divergence(), probe(), refusals()))
    for words in ("harmless", "-64.0 to -30.0 points", "tuned 5.0%", "Open <b>my</b> door.", "refused: I cannot help.",
                  "word wo...", "need not be harmful"):  # fmt: skip
        assert words in page.text, words


def test_every_part_stands_there_with_how_far_it_moved_and_what_it_is_worth():
    page = Read(inside.part(changed()))
    assert page.open == []
    for words in ("block 1 <b>", "block 2", "embedding", "40.0%", "3.1%", "+31.0, needed", "unclear", "unchanged",
                  "+22.0 to +39.0", "200 of 500 test rows", "strength 0.75 ◆", "Parts work together.",
                  "tunewright merge runs/a --base-share 0.25", "general questions"):  # fmt: skip
        assert words in page.text, words
    assert page.names.count("svg") == page.names.count("figcaption") == page.names.count("details") == 2


def test_what_was_lost_is_counted_and_what_moved_is_not_called_lost():
    page = Read(inside.lost(divergence(), probe(), refusals()))
    assert page.open == []
    for words in ("right before, wrong now: broken", "Of 60 general questions", "73.0%", "0.04 nats a token",
                  "not measured: KL of the answers, the base had no head", "base against itself"):  # fmt: skip
        assert words in page.text, words
    assert "forgot" not in page.text.lower()
    assert page.names.count("svg") == 3


@pytest.mark.parametrize("source", [inside.part(changed()), inside.lost(divergence(), probe(), refusals())])
def test_nothing_runs_nothing_is_fetched_and_every_picture_has_a_title(source):
    page = Read(source)
    assert not {"script", "b", "i", "img", "link"} & set(page.names)
    assert not {"src", "href", "onclick", "style", "id"} & {key for key, _ in page.attributes}
    assert page.names.count("title") >= page.names.count("svg") > 0
    assert "&lt;b&gt;" in source or "<b>" not in source


def test_the_same_numbers_give_the_same_bytes():
    assert inside.part(changed()) == inside.part(changed())


def test_what_did_not_run_says_why():
    page = Read(inside.part({"not_run": "x < y"}))
    assert page.text == "not measured: x < y"
    both = Read(inside.lost({"not_run": "no texts"}, {"not_run": "no words"}, {"not_run": "no voice"}))
    assert "not measured: no texts" in both.text
    assert "not measured: no words" in both.text
    assert "not measured: no voice" in both.text
