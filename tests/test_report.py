"""The report room: a run folder in; a page and a card out that are honest, safe, small and the same each time."""

from __future__ import annotations

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunewright.errors import RunError
from tunewright.runs.report import charts, first, page, words
from tunewright.runs.report.card import write_card
from tunewright.runs.report.first import ONE_RUN
from tunewright.runs.report.page import LIMIT, write_report
from tunewright.runs.report.record import Measure

INTENTS = ("billing", "cancel order", "delivery", "refund", "login & password", "other")
TICKETS = (
    "My card was charged twice for order 5521, I want the second charge back today",
    "please stop the order i made this morning, wrong address",
    "Where is my parcel? The tracking page has said 'in transit' since Monday.",
    "I can't get into my account, the reset mail never arrives",
    "Does the blue one come in size 44?",
    "I sent the shoes back three weeks ago and have heard nothing since. " * 8,
)


def measure(name: str, base: float, tuned: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    """One entry of evidence.json's `measures`."""
    usual = {
        "about": "task",
        "n": 500,
        "baseline": "zero-shot",
        "p": 1e-30,
        "higher_is_better": True,
        "proportion": True,
    }
    numbers = {"name": name, "base": base, "tuned": tuned, "difference": tuned - base, "ci95": [low, high]}
    return usual | {"method": "Tango score interval"} | numbers | more


def text_run(folder: Path, flips: int = 31, seed: int = 0) -> Path:
    """A run on support tickets with six labels and a clear verdict. Every number in it is made up."""
    draw = random.Random(seed)
    lower = {"higher_is_better": False, "proportion": False, "method": "t on the differences"}
    write(folder, "evidence.json", {
        "verdict": {
            "answer": "better", "margin": 0.02, "smallest_detectable": 0.0402,
            "sentence": "The tuned model is clearly better at your task: it fixed 210 of 500 rows and broke 10 "
                        "(+40.0 points, 95% interval +35.6 to +44.4).",
            "not_measured": ["robustness: evaluate.perturb is off", "groups: no group column was named"],
        },
        "measures": [
            measure("accuracy", 0.51, 0.91, 0.356, 0.444),
            measure("macro_f1", 0.4782, 0.8991, 0.37, 0.47, method="paired bootstrap, 10,000 draws"),
            measure("log_loss", 1.4231, 0.31239, -1.23, -0.99, **lower),
            measure("accuracy", 0.71, 0.7067, -0.0166, 0.0098, about="general", n=600),
            measure("ece", 0.21, 0.041, -0.2, -0.13, about="calibration", **lower),
        ],
        "flips": {"fixed": 210, "broken": 10, "kept_right": 245, "still_wrong": 35,
                  "examples": [ticket(i, i < 10, draw) for i in range(flips)]},
        "baseline": {"name": "zero-shot", "text": "The base has no head for your labels, so it chose the likeliest."},
        "confusion": {"labels": list(INTENTS), "base": squares(500, 0.51, draw), "tuned": squares(500, 0.91, draw)},
        "cost": {"train_seconds": 754.2, "peak_memory_bytes": 2.31e9, "predicted_peak_memory_bytes": 2.45e9,
                 "trainable_parameters": 22_715_142, "total_parameters": 22_715_142, "rows_per_second": 61.28},
        "advice": "Look at the 10 broken rows before you use it.",
    })  # fmt: skip
    curves(folder, draw)
    write(folder, "data.json", {
        "files": [{"file": "tickets.jsonl", "split": "train", "format": "jsonl", "sha256": "9f2c" * 16,
                   "rows_read": 5040, "rows_kept": 4987, "dropped": {"empty text": 12, "exact duplicate": 41}}],
        "labels": {"train": dict(zip(INTENTS, (1490, 1022, 811, 602, 377, 185), strict=True)),
                   "test": dict(zip(INTENTS, (166, 110, 90, 71, 43, 20), strict=True))},
        "duplicates": {"exact": 41, "near": 9}, "conflicts": 3, "overlap_dropped": 5,
        "lengths": {"min": 2, "median": 31, "p95": 118, "max": 502, "unit": "tokens"},
        "truncated": {"rows": 4, "of": 4987},
        "notes": ["3 inputs carry two labels; all were kept.", "holdout 0.1 was drawn by groups of equal texts."],
    })  # fmt: skip
    write(folder, "environment.json", {
        "tunewright": "0.1.0", "python": "3.11.9", "torch": "2.9.1", "transformers": "5.1.0", "device": "cuda (H200)",
        "precision": "bf16", "precision_reason": "the device supports it (SM 9.0)", "threads": 2, "seed": 0,
        "platform": "Linux x86_64",
    })  # fmt: skip
    write(folder, "usage.json", {
        "load": ["from transformers import pipeline",
                 'classify = pipeline("text-classification", model="runs/tickets/model")', 'classify("Where is it?")'],
        "predict": ['tunewright predict runs/tickets "Where is it?"',
                    "tunewright predict runs/tickets new.jsonl --json"],
        "library": "transformers", "pipeline": "text-classification", "labels": list(INTENTS),
        "base": {"checkpoint": "sentence-transformers/all-MiniLM-L6-v2", "revision": "c9745ed1d9f2"},
        "task": "text-classification", "method": "full", "name": "tickets",
    })  # fmt: skip
    recipe = ["model:", "  checkpoint: sentence-transformers/all-MiniLM-L6-v2", "task: text-classification", "data:",
              "  train: tickets.jsonl", "  holdout: 0.1             # default", "method: full", "train:",
              "  learning_rate: 2.0e-05   # given", "seed: 0"]  # fmt: skip
    (folder / "recipe.yaml").write_text("\n".join(recipe) + "\n", encoding="utf-8")
    return folder


def ticket(index: int, broken: bool, draw: random.Random) -> dict[str, Any]:
    truth, other = draw.sample(INTENTS, 2)
    base, tuned = (truth, other) if broken else (other, truth)
    return {"row": f"tickets.jsonl:{index * 7 + 3}", "kind": "broken" if broken else "fixed",
            "input": draw.choice(TICKETS), "truth": truth, "base": base, "tuned": tuned,
            "score": draw.uniform(0.4, 1)}  # fmt: skip


def curves(folder: Path, draw: random.Random) -> None:
    lines(folder, "metrics.jsonl", [
        {"step": s, "epoch": s / 100, "loss": 1.8 * math.exp(-s / 70) + 0.2 + draw.gauss(0, 0.09) * math.exp(-s / 200),
         "learning_rate": 2e-5, "grad_norm": 1.0, "seconds": s * 2.5} for s in range(1, 301)
    ])  # fmt: skip
    lines(folder, "evaluations.jsonl", [
        {"step": s, "epoch": s / 100, "split": "validation", "loss": 1.7 * math.exp(-s / 80) + 0.29,
         "accuracy": 0.91 - 0.4 * math.exp(-s / 60), "macro_f1": 0.9 - 0.43 * math.exp(-s / 60)}
        for s in range(0, 301, 30)
    ])  # fmt: skip


def image_run(folder: Path) -> Path:
    """A run on images with two labels that ends in "can't tell"; some files of the folder are absent."""
    draw = random.Random(3)
    (folder / "pictures").mkdir()
    write(folder, "evidence.json", {
        "verdict": {
            "answer": "can't tell", "margin": 0.02, "smallest_detectable": 0.112,
            "sentence": "Can't tell: this test could only have seen a change of about 11 points; about 4500 more rows "
                        "would settle it. It fixed 5 of 60 rows and broke 4 (+1.7 points, 95% interval -8.5 to +12.1).",
            "not_measured": ["general: no general rows were given"],
        },
        "measures": [measure("accuracy", 0.85, 0.8667, -0.085, 0.121, n=60, baseline="majority", p=0.77)],
        "flips": {"fixed": 5, "broken": 4, "kept_right": 47, "still_wrong": 4,
                  "examples": [leaf(folder, i, i < 4, draw) for i in range(9)]},
        "confusion": {"labels": ["healthy", "rust"], "base": [[28, 4], [5, 23]], "tuned": [[29, 3], [5, 23]]},
        "cost": {"train_seconds": 21.4, "peak_memory_bytes": 811e6, "trainable_parameters": 1538,
                 "total_parameters": 21_800_000},
        "advice": "Add held-out rows, or accept that a change this small cannot be shown with these.",
    })  # fmt: skip
    write(folder, "solved.json", {"text": "The head was solved in closed form from 540 rows; there were no steps."})
    write(folder, "usage.json", {
        "name": "leaves", "task": "image-classification", "method": "head", "library": "transformers",
        "pipeline": "image-classification", "base": {"checkpoint": "./models/vit-tiny"},
        "load": ['pipeline("image-classification", model="runs/leaves/model")'],
    })  # fmt: skip
    return folder


def leaf(folder: Path, index: int, broken: bool, draw: random.Random) -> dict[str, Any]:
    from PIL import Image

    name = f"leaf_{index}.png"
    light = Image.radial_gradient("L").resize((200, 150)).point(lambda v: 255 - v)
    shades = (40 + 20 * index, 150 - 9 * index, 60)
    bands = [light.point(lambda v, shade=shade: v * shade // 255) for shade in shades]
    Image.merge("RGB", bands).save(folder / "pictures" / name)
    truth, other = ("healthy", "rust") if index % 2 else ("rust", "healthy")
    base, tuned = (truth, other) if broken else (other, truth)
    return {"row": name, "kind": "broken" if broken else "fixed", "input": name, "image": f"pictures/{name}",
            "truth": truth, "base": base, "tuned": tuned, "score": draw.uniform(0.5, 1)}  # fmt: skip


def squares(total: int, right: float, draw: random.Random) -> list[list[int]]:
    """A made-up confusion matrix with `right` of each row on the diagonal."""
    size = len(INTENTS)
    matrix = [[0] * size for _ in range(size)]
    for row in range(size):
        for _ in range(total // size):
            matrix[row][row if draw.random() < right else draw.choice([c for c in range(size) if c != row])] += 1
    return matrix


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def lines(folder: Path, name: str, values: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


# ---------------------------------------------------------------- reading the page as a browser would
class Page(HTMLParser):
    """Elements, attributes and text of a page; `faults` are tags that do not match."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        self.faults += [f"<{name}> is never closed" for name in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def edit(folder: Path, name: str, **changes: Any) -> None:
    write(folder, name, {**json.loads((folder / name).read_text(encoding="utf-8")), **changes})


@pytest.fixture(params=[text_run, image_run], ids=["text", "image"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path)


# ---------------------------------------------------------------- the page
@pytest.mark.promise(13)
def test_the_first_screen_says_verdict_cost_sureness_rows_and_next_step(tmp_path: Path) -> None:
    source = report(text_run(tmp_path))
    first = Page(source[source.index("<main>") : source.index("</section>") + len("</section>")]).text
    said = [
        "clearly better at your task",
        "On 600 rows of other skills",
        "500 held-out rows",
        ONE_RUN,
        "245 kept right",
        "210 fixed",
        "Look at the 10 broken rows",
    ]
    places = [first.find(part) for part in said]
    assert -1 not in places
    assert places == sorted(places)
    assert "significant" not in source
    assert not re.search(r"\bp [<=]|p-value", first)
    assert "no meaningful change (within your 2 points)" in first


@pytest.mark.promise(13)
def test_the_parts_stand_in_fixed_order(run: Path) -> None:
    questions = re.findall(r"<summary><h2>(.*?)</h2>", report(run))
    assert questions == [
        "Is it better?", "Which rows?", "Where does it err?", "For whom?", "What did it lose?",
        "Does it hold when input is messy?", "Can I trust its confidence?", "What changed inside?", "Why this answer?",
        "Did it learn by heart?", "How did it learn?",
        "What did it learn from?", "What did it cost?", "How to use it", "How was it made?",
        "What was not measured, and limits",
    ]  # fmt: skip


def test_the_page_is_well_formed_and_every_svg_has_a_title(run: Path) -> None:
    source = report(run)
    parsed = Page(source)
    assert parsed.faults == []
    drawings = re.findall(r"<svg[^>]*>(.{7})", source)
    assert len(drawings) >= 8
    assert set(drawings) == {"<title>"}
    named = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(named) == len(set(named))
    targets = {attributes["href"][1:] for attributes in parsed.named("a")}
    assert targets == {"rows-fixed", "rows-broken"}
    assert targets <= set(named)


def test_every_chart_has_a_sentence_and_its_table(tmp_path: Path) -> None:
    figures = re.findall(r"<figure>.*?</figure>", report(text_run(tmp_path)), flags=re.DOTALL)
    assert len(figures) >= 8
    for figure in figures:
        assert re.search(r"<figcaption>[^<]{20,}[.]</figcaption>", figure)
        assert "<table>" in figure
        assert "<svg" in figure


SCRIPT = Path(page.__file__).with_name("rows.js").read_text(encoding="utf-8").strip()


def assert_no_script_but_ours(source: str) -> None:
    """One script element, its text byte for byte that of rows.js, and a policy that lets a browser run nothing else."""
    import base64
    import hashlib

    scripts = re.findall(r"<\s*script[^>]*>(.*?)<\s*/\s*script", source, flags=re.DOTALL | re.IGNORECASE)
    assert scripts == [SCRIPT]
    assert len(re.findall(r"<\s*script", source, flags=re.IGNORECASE)) == 1
    styles = re.findall(r"<style>(.*?)</style>", source, flags=re.DOTALL)
    assert len(styles) == 1
    inside, style = (base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (SCRIPT, styles[0]))
    policies = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', source)
    assert [html.unescape(text) for text in policies] == [
        f"default-src 'none'; script-src 'sha256-{inside}'; style-src 'sha256-{style}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    ]
    assert source.index("Content-Security-Policy") < source.index("<style>") < source.index("<script")


@pytest.mark.promise(15)
def test_the_script_touches_nothing_but_the_page() -> None:
    """It takes no data in, makes no markup, asks for nothing and keeps nothing."""
    assert len(SCRIPT) < 5000
    for word in ("eval", "Function", "innerHTML", "outerHTML", "insertAdjacent", "document.write", "fetch", "XMLHttp",
                 "import", "http", "src", "cookie", "Storage", "postMessage", "WebSocket", "sendBeacon"):  # fmt: skip
        assert word not in SCRIPT, word


@pytest.mark.promise(15)
def test_nothing_is_fetched_and_nothing_runs(run: Path) -> None:
    source = report(run)
    parsed = Page(source)
    loads = [
        value for _, a in parsed.elements for key, value in a.items() if key in ("src", "href", "srcset", "xlink:href")
    ]
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in loads)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {name for name, _ in parsed.elements}
    assert_no_script_but_ours(source)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "@import" not in style
    assert "http" not in style
    assert set(re.findall(r"url\((.)", style)) <= {"#"}
    assert parsed.named("html") == [{"lang": "en"}]


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    once, card = write_report(run).read_bytes(), write_card(run).read_bytes()
    assert write_report(run).read_bytes() == once
    assert write_card(run).read_bytes() == card


@pytest.mark.promise(13)
def test_what_is_absent_is_said_in_its_place(tmp_path: Path) -> None:
    text_run(tmp_path)
    for file in ("data.json", "environment.json", "usage.json", "metrics.jsonl", "evaluations.jsonl", "recipe.yaml"):
        (tmp_path / file).unlink()
        assert f"the run folder has no {file}" in Page(report(tmp_path)).text
    bare = tmp_path / "bare"
    bare.mkdir()
    write(bare, "evidence.json", {})
    source = report(bare)
    assert Page(source).faults == []
    assert source.count("not measured") >= 10
    assert write_card(bare).read_text(encoding="utf-8").count("not measured") >= 2


def test_a_half_written_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    text_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 301, "lo')
    text = Page(report(tmp_path)).text
    assert "left out of metrics.jsonl: 1 line" in text
    assert "in 300 steps" in text


@pytest.mark.parametrize("content", [None, "{", "[]", "\ufeff"])
def test_no_report_without_readable_evidence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "evidence.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"evidence\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("answer", [*first.ANSWERS, "a new word"])
def test_every_answer_has_a_sign_beside_its_colour(tmp_path: Path, answer: str) -> None:
    text_run(tmp_path)
    edit(tmp_path, "evidence.json", verdict={"answer": answer, "sentence": f"Said: {answer}."})
    source = report(tmp_path)
    assert re.search(r'<p class="answer \w+"><span aria-hidden="true">.</span>', source)


def test_a_task_without_right_and_wrong_shows_its_difference_instead_of_the_strip(tmp_path: Path) -> None:
    measure = {"name": "log_loss", "about": "task", "n": 90, "base": 3.1, "tuned": 2.2, "difference": -0.9,
               "ci95": [-1.1, -0.7], "higher_is_better": False, "proportion": False}  # fmt: skip
    long = "the cat sat on the mat and looked at the moon"
    changed = {"row": "a.txt:1", "kind": "changed", "input": "Once", "truth": None, "base": long,
               "tuned": long.replace("moon", "sun"), "score": -3.2}  # fmt: skip
    write(tmp_path, "evidence.json", {"verdict": {"answer": "better", "sentence": "The tuned model is better."},
                                      "measures": [measure], "flips": {"examples": [changed]}})  # fmt: skip
    source = report(tmp_path)
    first = source[: source.index("</section>")]
    assert "fixed and broken rows" in first
    assert 'class="mark better"' in first
    assert "<mark>sun</mark>" in source
    assert Page(source).faults == []


# ---------------------------------------------------------------- rows
@pytest.mark.promise(13)
def test_broken_rows_come_first_the_surest_on_top_and_the_page_says_what_it_leaves_out(tmp_path: Path) -> None:
    text_run(tmp_path, flips=2000)
    source = report(tmp_path)
    assert len(source.encode()) <= LIMIT
    assert 0 < source.index('id="rows-broken"') < source.index('id="rows-fixed"')
    assert source.count('data-label="Truth"') == 600
    assert "1,400 more rows not shown" in source
    broken = source[source.index('id="rows-broken"') : source.index('id="rows-fixed"')]
    sure = [int(text) for text in re.findall(r"(\d+)% sure", broken)]
    assert len(sure) == 10
    assert sure == sorted(sure, reverse=True)


def test_rows_of_the_same_score_stand_below_and_a_missing_answer_is_named(tmp_path: Path) -> None:
    text_run(tmp_path, flips=4)
    flips = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))["flips"]
    other = {"row": "tickets.jsonl:9", "input": "Where is it?", "truth": "delivery", "base": "refund", "score": 0.9}
    others = [other | {"kind": "changed", "tuned": "other"}, other | {"kind": "still_wrong", "tuned": None}]
    edit(tmp_path, "evidence.json", flips=flips | {"others": others, "changed": 1, "same_wrong": 3})
    source = report(tmp_path)
    kinds = re.findall(r'data-kind="(\w+)" aria-pressed', source)
    assert kinds == ["broken", "fixed", "changed", "still_wrong"]
    assert [source.index(f'id="rows-{kind}"') for kind in kinds] == sorted(
        source.index(f'id="rows-{k}"') for k in kinds
    )
    last = source[source.index('id="rows-still_wrong"') :]
    assert "2 more rows not shown" in last
    assert '<span class="absent">no answer</span>' in last
    assert not re.search(r">\s*(null|None|nan)\s*<", source)
    assert '<div class="controls" id="rows-controls" hidden>' in source


def test_a_page_of_long_and_awkward_rows_stays_small(tmp_path: Path) -> None:
    text_run(tmp_path, flips=200)
    evidence = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    for row in evidence["flips"]["examples"]:
        row.update(input="<&\"'" * 5000, base="&" * 20000, tuned="\u65e5\u672c" * 9000)
    edit(tmp_path, "evidence.json", flips=evidence["flips"])
    source = report(tmp_path)
    assert len(source.encode()) <= LIMIT
    assert source.count('data-label="Truth"') >= 15


def test_a_long_text_is_cut_and_its_rest_stands_behind_a_disclosure_once(tmp_path: Path) -> None:
    text_run(tmp_path)
    story = " ".join(f"word{i}" for i in range(200))
    example = {"row": "a.jsonl:1", "kind": "broken", "input": story, "truth": "x", "base": "x", "tuned": "y"}
    edit(
        tmp_path,
        "evidence.json",
        flips={"fixed": 0, "broken": 1, "kept_right": 1, "still_wrong": 1, "examples": [example]},
    )
    source = report(tmp_path)
    assert source.count("word7 ") == 1
    assert source.count("word199") == 1
    assert source.index("word7 ") < source.index("more characters") < source.index("word199")


def test_pictures_are_thumbnails_inside_the_page(tmp_path: Path) -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    image_run(tmp_path)
    deep = np.linspace(0, 4000, 64 * 48, dtype=np.uint16).reshape(48, 64)
    Image.fromarray(deep).save(tmp_path / "pictures" / "leaf_0.png")
    (tmp_path / "pictures" / "leaf_1.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "pictures" / "leaf_2.png").unlink()
    parsed = Page(report(tmp_path))
    pictures = [Image.open(io.BytesIO(base64.b64decode(a["src"].partition(",")[2]))) for a in parsed.named("img")]
    assert len(pictures) == 7
    assert all(max(picture.size) <= 96 for picture in pictures)
    deep_one = next(picture for picture in pictures if picture.mode == "L")
    assert deep_one.getextrema() == pytest.approx((0, 255), abs=6)
    assert "cannot be opened as a picture" in parsed.text
    assert "its file is not there" in parsed.text
    assert all(a["alt"].startswith("Picture of row") for a in parsed.named("img"))


def test_at_most_a_hundred_and_twenty_pictures_are_inlined(tmp_path: Path) -> None:
    image_run(tmp_path)
    evidence = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    evidence["flips"]["examples"] *= 20
    edit(tmp_path, "evidence.json", flips=evidence["flips"])
    parsed = Page(report(tmp_path))
    assert len(parsed.named("img")) == 120
    assert "left out to keep the page small" in parsed.text


# ---------------------------------------------------------------- safety
PAYLOADS = (
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>", "<svg><title></title><script>alert(1)</script></svg>", '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='", "<a href='javascript:alert(1)'>x</a>", "javascript:alert(1)",
    "</style><script>alert(1)</script>", "</title></svg><iframe srcdoc='<script>alert(1)</script>'>",
    "{{ ''.__class__ }}{% for x in y %}", "\u2028<script>alert(1)</script>\u2029", "--><!--<script>alert(1)</script>",
    "\x00<scr\x00ipt>alert(1)</script>\x1b[31m", "\ud800<b onclick=alert(1)>", "&lt;script&gt;alert(1)&lt;/script&gt;",
    "```\n<script>alert(1)</script>", "]]><script>alert(1)</script>", "url(javascript:alert(1))",
)  # fmt: skip
KEPT = frozenset({"kind", "about", "image"})


def poisoned(value: Any, payload: str, key: str = "") -> Any:
    """`value` with `payload` in every text and, where keys are names from data, in the keys."""
    if isinstance(value, dict):
        names = key in ("dropped", "train", "test", "duplicates")
        return {k + payload if names else k: poisoned(v, payload, k) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(entry, payload, key) for entry in value]
    return value + payload if isinstance(value, str) and key not in KEPT else value


@pytest.mark.promise(15)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_data_stays_text(tmp_path: Path, payload: str) -> None:
    text_run(tmp_path, flips=6)
    clean = Page(report(tmp_path))
    for file in ("evidence.json", "data.json", "environment.json", "usage.json"):
        write(tmp_path, file, poisoned(json.loads((tmp_path / file).read_text(encoding="utf-8")), payload))
    evaluations = [{"step": s, "split": "validation" + payload, "accuracy" + payload: s / 9} for s in range(9)]
    lines(tmp_path, "evaluations.jsonl", evaluations)
    (tmp_path / "recipe.yaml").write_text(payload, encoding="utf-8", errors="replace")
    source = report(tmp_path)
    parsed = Page(source)
    assert parsed.faults == []
    assert_no_script_but_ours(source)
    assert parsed.named("iframe") == []
    assert not [key for _, a in parsed.elements for key in a if key.startswith("on") or key in ("autofocus", "srcdoc")]
    assert {name for name, _ in parsed.elements} <= {name for name, _ in clean.elements} | {"details", "mark"}
    assert {a["href"] for a in parsed.named("a")} <= {"#rows-fixed", "#rows-broken"}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", source)


@pytest.mark.promise(15)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_data_does_not_reach_the_card(tmp_path: Path, payload: str) -> None:
    text_run(tmp_path, flips=6)
    for file in ("evidence.json", "data.json", "environment.json", "usage.json"):
        write(tmp_path, file, poisoned(json.loads((tmp_path / file).read_text(encoding="utf-8")), payload))
    matter, text = front_and_body(write_card(tmp_path))
    outside_code = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert len(matter["model-index"]) == 1
    assert "base_model" not in matter
    assert not re.search("<[a-zA-Z/!]", outside_code)
    assert outside_code.count("\n## ") == 6


# ---------------------------------------------------------------- the card
def front_and_body(path: Path) -> tuple[dict[str, Any], str]:
    _, matter, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(matter), text


def test_the_card_is_read_by_huggingface_hub(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    data: Any = ModelCard(write_card(text_run(tmp_path)).read_text(encoding="utf-8")).data
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.model_name == "tickets"
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "accuracy": 0.91, "macro_f1": 0.8991, "log_loss": 0.31239}  # fmt: skip
    assert results["accuracy"].dataset_name == "held-out rows of tickets.jsonl"


def test_the_metadata_says_how_many_rows_and_how_sure(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    data: Any = ModelCard(write_card(text_run(tmp_path)).read_text(encoding="utf-8")).data
    accuracy = next(result for result in data.eval_results if result.metric_type == "accuracy")
    assert accuracy.metric_name == (
        "accuracy (500 held-out rows; before 51.0% (zero-shot); difference +40.0 points, 95% interval +35.6 to +44.4)"
    )


def test_test_rows_of_the_hub_get_the_newer_format_beside_it(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", minversion="1.4", reason="older ones do not know the newer format")
    text_run(tmp_path)
    files = [{"file": "glue#sst2:validation", "split": "test", "format": "hub", "rows_read": 872, "rows_kept": 872}]
    edit(tmp_path, "data.json", files=files)
    (tmp_path / "recipe.yaml").write_text("data:\n  train: a.csv\n  test: nyu-mll/glue#sst2:validation\n")
    write_card(tmp_path)
    written = yaml.safe_load((tmp_path / ".eval_results" / "tunewright.yaml").read_text(encoding="utf-8"))
    entries = hub.parse_eval_result_entries(written)
    assert hub.eval_result_entries_to_yaml(entries) == written
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("nyu-mll/glue", "sst2", 0.91), ("nyu-mll/glue", "sst2", 0.8991), ("nyu-mll/glue", "sst2", 0.31239),
    ]  # fmt: skip
    assert "500 held-out rows" in str(entries[0].notes)
    assert "95% interval +35.6 to +44.4" in str(entries[0].notes)
    assert entries[0].date is None, "the same run, the same bytes"


@pytest.mark.parametrize(
    "recipe", ["data: {test: rows.csv}", "data: {train: org/name}", "data: [", "{{", "data: {test: a/b}"]
)
def test_a_private_file_is_never_called_a_benchmark(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)  # a saved data set looks like a hub id, and is a folder
    text_run(tmp_path)
    edit(tmp_path, "data.json", files=[{"file": "b", "split": "test", "format": "hub"}])
    (tmp_path / "recipe.yaml").write_text(recipe)
    write_card(tmp_path)
    assert not (tmp_path / ".eval_results").exists()


@pytest.mark.promise(13)
def test_the_card_says_verdict_scores_use_and_limits(tmp_path: Path) -> None:
    _, text = front_and_body(write_card(text_run(tmp_path)))
    assert "it fixed 210 of 500 rows and broke 10" in text
    assert "| accuracy | task | 500 | 51.0% | 91.0% | +40.0 points | +35.6 to +44.4 | clearly better |" in text
    assert 'classify = pipeline("text-classification", model="runs/tickets/model")' in text
    assert "not measured: robustness" in text
    assert ONE_RUN in text


@pytest.mark.parametrize(
    ("checkpoint", "revision", "expected"),
    [
        ("org/model", None, "org/model"),
        ("bert-base-uncased", "abc", "bert-base-uncased"),
        ("bert-base-uncased", None, None),
        ("./models/tiny", "abc", None),
        ("/models/tiny", None, None),
        ("a/b/c", None, None),
        ("~/model", None, None),
        ("", None, None),
    ],
)
def test_only_a_hub_id_is_named_as_base(
    tmp_path: Path, checkpoint: str, revision: str | None, expected: str | None
) -> None:
    edit(text_run(tmp_path), "usage.json", base={"checkpoint": checkpoint, "revision": revision})
    matter, _ = front_and_body(write_card(tmp_path))
    assert matter.get("base_model") == expected
    assert ("base_model_relation" in matter) == bool(expected)


def test_a_local_folder_that_looks_like_a_hub_id_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    edit(text_run(tmp_path), "usage.json", base={"checkpoint": "models/tiny"})
    monkeypatch.chdir(tmp_path)
    matter, _ = front_and_body(write_card(tmp_path))
    assert "base_model" not in matter


# ---------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.123456, "0.123"),
        (1.0, "1"),
        (45.678, "45.7"),
        (1234.5, "1,230"),
        (999.9, "1,000"),
        (-2.5, "\u22122.5"),
        (0.00012345, "0.000123"),
        (0.0000123, "1.23e-5"),
        (2.5e12, "2.5e12"),
        (float("nan"), "not measured"),
        (None, "not measured"),
        (float("inf"), "not measured"),
        (True, "not measured"),
    ],
)
def test_a_number_has_three_digits_at_most(value: Any, said: str) -> None:
    assert words.number(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.91, "91.0%"), (0.9123, "91.2%"), (1, "100%"), (0.9999, "> 99.9%"), (0.0001, "< 0.1%"), (0, "0.0%")],
)
def test_a_share_is_percent_and_never_rounds_to_all_or_nothing(value: float, said: str) -> None:
    assert words.share(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.082, "+8.2 points"),
        (-0.04, "\u22124.0 points"),
        (0.0, "0.0 points"),
        (1.0, "+100 points"),
        (0.0002, "+0.02 points"),
    ],
)
def test_a_difference_of_shares_is_said_in_points(value: float, said: str) -> None:
    assert words.points(value) == said


def test_durations_sizes_and_counts_are_said_as_people_do() -> None:
    assert [words.duration(s) for s in (0.5, 42, 200, 7500)] == ["0.5 s", "42 s", "3 min 20 s", "2 h 05 min"]
    assert [words.size(b) for b in (512, 2**30, 2.31e9)] == ["512 bytes", "1 GiB", "2.15 GiB"]
    assert [words.large(n) for n in (1538, 22_715_142, 7e9)] == ["1,538", "22.7 million", "7 billion"]
    assert words.sentence("(-4.0 points, 95% interval -8.5 to +12.1) on 2024-05-01") == (
        "(\u22124.0 points, 95% interval \u22128.5\u00a0to\u00a0+12.1) on 2024-05-01")  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "higher", "said"),
    [
        (0.03, 0.08, True, "clearly better"),
        (0.005, 0.08, True, "better"),
        (-0.01, 0.015, True, "no meaningful change"),
        (0.001, 0.015, True, "a real but tiny gain"),
        (-0.015, -0.001, True, "a real but tiny loss"),
        (-0.03, 0.09, True, "can't tell"),
        (-0.09, -0.03, True, "worse"),
        (-0.09, -0.03, False, "clearly better"),
        (0.03, 0.09, False, "worse"),
        (None, None, True, "no interval"),
    ],
)
def test_a_finding_follows_the_words_fixed_before(
    low: float | None, high: float | None, higher: bool, said: str
) -> None:
    row: dict[str, Any] = {
        "name": "accuracy",
        "base": 0.5,
        "tuned": 0.5,
        "ci95": [low, high],
        "higher_is_better": higher,
    }
    assert Measure.read(row, margin=0.02).finding == said


# ---------------------------------------------------------------- charts
def test_the_strip_is_drawn_to_scale() -> None:
    picture = charts.row_strip({"kept_right": 245, "fixed": 210, "broken": 10, "still_wrong": 35})
    blocks = re.findall(r'<rect x="([\d.]+)%" y="0" width="([\d.]+)%"', picture)
    starts, widths = ([float(block[i]) for block in blocks] for i in (0, 1))
    assert widths == pytest.approx([49, 42, 2, 7], abs=0.01)
    assert starts == pytest.approx([0, 49, 91, 93], abs=0.01)


def test_better_is_right_of_zero_whatever_the_metric() -> None:
    for higher, difference in ((True, 0.3), (False, -0.3)):
        row = {
            "name": "x",
            "base": 1.0,
            "tuned": 1 + difference,
            "ci95": sorted((difference * 0.5, difference * 1.5)),
            "higher_is_better": higher,
        }
        picture = charts.forest([Measure.read(row, 0.02)])
        zero = float(re.search(r'x1="([\d.]+)%"[^>]*class="zero"', picture).group(1))  # type: ignore[union-attr]
        dot = float(re.search(r'<circle cx="([\d.]+)%"[^>]*class="mark better"', picture).group(1))  # type: ignore[union-attr]
        assert dot > zero


def test_ticks_are_round_and_inside() -> None:
    assert charts.Scale(0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.Scale(-3.1, 12.2).ticks() == pytest.approx([0, 5, 10])
    assert charts.Scale(2.0, 2.0).ticks()


def test_a_long_curve_is_thinned_to_means_that_keep_its_ends() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    few = charts.thin(points)
    assert len(few) == charts.MOST_POINTS
    assert few[0] == points[0]
    assert few[-1] == points[-1]
    assert sum(y for _, y in few) / len(few) == pytest.approx(3.0, abs=0.05)


def test_joined_labels_keep_every_row() -> None:
    draw = random.Random(1)
    labels = [f"label {i}" for i in range(40)]
    base, tuned = ([[draw.randint(0, 9) for _ in labels] for _ in labels] for _ in range(2))
    names, first, second = charts.joined(labels, base, tuned)
    assert len(names) == charts.MOST_LABELS
    assert names[-1] == "29 others"
    assert sum(map(sum, first)) == sum(map(sum, base))
    assert sum(map(sum, second)) == sum(map(sum, tuned))


def test_many_labels_and_few_steps_still_make_a_page(tmp_path: Path) -> None:
    text_run(tmp_path)
    labels = [f"a rather long label name number {i}" for i in range(150)]
    squares_ = [[int(i == j) * 3 + (i + j) % 2 for j in range(150)] for i in range(150)]
    edit(tmp_path, "evidence.json", confusion={"labels": labels, "base": squares_, "tuned": squares_})
    lines(tmp_path, "metrics.jsonl", [{"step": 1, "loss": 0.7}])
    lines(tmp_path, "evaluations.jsonl", [{"step": 0, "accuracy": 0.0}])
    source = report(tmp_path)
    assert Page(source).faults == []
    assert len(source.encode()) < LIMIT / 3
    assert "NaN" not in source


# ---------------------------------------------------------------- colours and sizes
def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def light(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_light_dark_and_print_and_is_never_small() -> None:
    style = (page.HERE / "style.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in re.findall(r":root {(.*?)}", style, re.DOTALL)
    ]
    assert len(themes) == 3
    for theme in themes:
        full = {
            name: colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
            for name, colour in theme.items()
        }
        for ground in ("paper", "card", "tint"):
            assert all(contrast(full[name], full[ground]) >= 4.5 for name in ("ink", "soft", "accent", "harm")), (
                theme,
                ground,
            )
            assert contrast(full["edge"], full[ground]) >= 3, (theme, ground)
    sizes = [
        float(size) * (16 if unit == "rem" else 1) for size, unit in re.findall(r"font-size: ([\d.]+)(rem|px)", style)
    ]
    assert len(sizes) >= 10
    assert min(sizes) >= 12
