"""The pages in a real browser: no complaint, no request, readable by eye, keys, phone, dark, and with scripts off.

Needs chromium on the PATH. The accessibility check needs axe-core, which is not ours to pack:
`npm install axe-core` beside the project, or TUNEWRIGHT_AXE=path/to/axe.min.js. What is absent is skipped and said.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, executable
from test_report import edit, image_run, text_run

from tunewright.runs.report.page import LIMIT, write_report
from tunewright.runs.report.side_by_side import write_side_by_side

ROOT = Path(__file__).parents[1]
AXE = Path(os.environ.get("TUNEWRIGHT_AXE") or ROOT / "node_modules" / "axe-core" / "axe.min.js")
OPEN_ALL = "document.querySelectorAll('details').forEach((part) => { part.open = true; })"
LOOKS = [(width, dark) for width in (1200, 390) for dark in (False, True)]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(executable() is None, reason="no chromium on the PATH: the pages were not looked at"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page each: text, pictures with "can't tell", 2,000 rows of which 600 flipped, and three runs side by side."""
    home = tmp_path_factory.mktemp("pages")
    for name in ("text", "image", "large"):
        (home / name).mkdir()
    text_run(home / "text", flips=30)
    image_run(home / "image")
    text_run(home / "large", flips=600)
    spoil(home / "text")
    grow(home / "large")
    found = {name: write_report(home / name) for name in ("text", "image", "large")}
    return found | {"several": write_side_by_side(table(), rows(), [home / "text"] * 3, home / "compare.html")}


def spoil(run: Path) -> None:
    """Rows of every kind, a text long enough to be cut, and an answer that is missing."""
    flips = json.loads((run / "evidence.json").read_text(encoding="utf-8"))["flips"]
    other = {"row": "tickets.jsonl:9", "input": "Where is it? " * 90, "truth": "delivery", "base": "refund"}
    others = [other | {"kind": "changed", "tuned": None}, other | {"kind": "still_wrong", "tuned": "refund"}]
    edit(run, "evidence.json", flips=flips | {"others": others, "changed": 1, "same_wrong": 1})


def grow(run: Path) -> None:
    """2,000 rows of 300 characters or so, 600 of them flipped."""
    draw = random.Random(5)
    evidence = json.loads((run / "evidence.json").read_text(encoding="utf-8"))
    flips = evidence["flips"] | {"fixed": 420, "broken": 180, "kept_right": 1200, "still_wrong": 200, "same_wrong": 200}
    kinds = ["broken"] * 180 + ["fixed"] * 420
    flips["examples"] = [
        row | {"kind": kind, "input": " ".join(draw.choice(("parcel", "refund", "late", "order")) for _ in range(50))}
        for row, kind in zip(flips["examples"], kinds, strict=True)
    ]
    flips["others"] = [row | {"kind": "still_wrong"} for row in flips["examples"][:40]]
    edit(run, "evidence.json", flips=flips)


def table() -> dict:
    line = {"method": "lora", "baseline": "zero-shot", "train_seconds": 20.0}
    pair = {"difference": -0.05, "ci95": [-0.08, -0.02], "p": 0.001, "p_holm": 0.002, "method": "Tango score interval"}
    return {
        "metric": "accuracy", "proportion": True, "higher_is_better": True, "n": 500, "best": 0,
        "runs": [line | {"run": name} for name in ("lora-8", "lora-64", "full")],
        "scores": [{"score": s, "ci95": [s - 0.03, s + 0.03]} for s in (0.91, 0.86, 0.909)],
        "against_best": [pair | {"run": 1}, pair | {"run": 2, "difference": 0.0, "ci95": [-0.02, 0.02], "p_holm": 1.0}],
    }  # fmt: skip


def rows() -> list[dict]:
    answers = ["delivery", "refund", None]
    return [{"row": f"tickets.jsonl:{i}", "input": "Where is it?" if i % 2 else None, "truth": "delivery",
             "answers": answers, "scores": [1.0, 0.0, None]} for i in range(30)]  # fmt: skip


PAGES = ("text", "image", "large", "several")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_complains_of_nothing_and_fits_every_width(browser, pages, name):
    for width, dark in LOOKS:
        browser.show(pages[name], width, 844 if width < 600 else 800, dark=dark)
        assert browser.complaints == [], (width, dark)
        assert browser.requests == [pages[name].absolute().as_uri()]
        assert browser.value("document.documentElement.scrollWidth") <= width
        browser.value(OPEN_ALL)
        assert browser.value("document.documentElement.scrollWidth") <= width, "with all parts open"


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: accessibility was not checked")
@pytest.mark.parametrize("name", [*PAGES[:2], "several", pytest.param("large", marks=pytest.mark.slow)])
def test_axe_finds_nothing_serious(browser, pages, name):
    asked = "axe.run().then((r) => r.violations.map((v) => [v.impact, v.id, v.nodes.length, v.nodes[0].html]))"
    rules = 0
    for width, dark in LOOKS:
        browser.show(pages[name], width, 844 if width < 600 else 800, dark=dark)
        browser.value(OPEN_ALL)
        browser.value(AXE.read_text(encoding="utf-8") + "; 0")
        found = browser.value(asked)
        assert [one for one in found if one[0] in ("serious", "critical")] == [], (width, dark)
        rules = rules or browser.value("axe.run().then((r) => r.passes.length)")
    assert rules >= 15


def test_two_thousand_rows_open_in_a_second_and_stay_small(browser, pages):
    size = pages["large"].stat().st_size
    assert size <= LIMIT
    took = []
    for _ in range(3):
        browser.show(pages["large"])
        took.append(browser.value("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    print(f"opened in {min(took):.0f} ms, {size:,} bytes")
    assert min(took) < 1000
    assert browser.value("document.querySelectorAll('#rows tr.row').length") == 640


def test_the_first_screen_needs_no_scrolling(browser, pages):
    browser.show(pages["text"], 1200, 800)
    assert browser.value("document.querySelector('.next').getBoundingClientRect().bottom") <= 800
    browser.show(pages["text"], 390, 844)
    assert browser.value("document.querySelector('h1').getBoundingClientRect().bottom") <= 500, (
        "the verdict comes first"
    )


def test_with_scripts_off_everything_is_there(browser, pages):
    browser.show(pages["text"], scripts=False)
    assert browser.complaints == []
    browser.click("#rows > summary")
    assert browser.value("document.getElementById('rows').open")
    assert not browser.value("document.getElementById('rows-controls').checkVisibility()")
    assert browser.value("[...document.querySelectorAll('#rows tr.row')].every((row) => row.checkVisibility())")
    assert browser.value("document.querySelectorAll('#rows tr.row').length") == 32


# ---------------------------------------------------------------- rows: mouse and keys
FOCUS = "document.activeElement.closest('tr.row') && document.activeElement.rowIndex"
SEEN = "[...document.querySelectorAll('#rows tr.row')].filter((row) => row.checkVisibility()).length"


def test_a_block_of_the_strip_leads_to_its_rows_and_keys_walk_them(browser, pages):
    browser.show(pages["text"])
    browser.click("a[href='#rows-fixed']")
    assert browser.value("document.getElementById('rows').open")
    assert browser.value(SEEN) == 20
    first = browser.value(FOCUS)
    assert first
    browser.press("j")
    browser.press("j")
    assert browser.value(FOCUS) == first + 2
    browser.press("k")
    assert browser.value(FOCUS) == first + 1
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    browser.click("button[data-step='1']")
    assert browser.value(FOCUS) == first + 2, "the button goes on from the same row as the key"
    browser.click("button[data-step='-1']")
    assert browser.value(FOCUS) == first + 1


def test_filters_and_search_show_what_they_say(browser, pages):
    browser.show(pages["text"])
    browser.value("document.getElementById('rows').open = true")
    seen = {}
    for kind in ("broken", "fixed", "changed", "still_wrong", ""):
        browser.click(f"button[data-kind='{kind}']")
        seen[kind] = browser.value(SEEN)
        pressed = "document.querySelector('button[aria-pressed=true]').dataset.kind"
        assert browser.value(pressed) == kind
    assert seen == {"broken": 10, "fixed": 20, "changed": 1, "still_wrong": 1, "": 32}
    browser.value("document.querySelector('#rows tr.row').focus()")
    browser.press("/")
    for letter in "no answer":
        browser.press(letter)
    assert browser.value(SEEN) == 1
    assert browser.value("document.getElementById('rows-status').textContent") == "1 of 32 listed rows"
    browser.press("Escape")
    assert browser.value(SEEN) == 32


def test_keys_do_nothing_outside_the_part(browser, pages):
    """Single letters are for those who are in the table: a screen reader's or a person's own keys stay theirs."""
    browser.show(pages["text"])
    browser.value("document.querySelector('#better > summary').focus()")
    browser.press("j")
    assert not browser.value(FOCUS)


def test_enter_opens_the_long_text_of_a_row(browser, pages):
    browser.show(pages["text"])
    browser.value("document.getElementById('rows').open = true")
    browser.click("button[data-kind='still_wrong']")
    browser.click("#rows-still_wrong .row td")
    rest = "document.querySelector('#rows-still_wrong details').open"
    assert not browser.value(rest)
    browser.press("Enter")
    assert browser.value(rest)
