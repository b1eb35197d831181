"""The first screen: the step that is named next follows a fixed order, and what it cost is said where a gauge knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_report import Page, edit, report, text_run, write

from tunewright.runs.report.first import elsewhere
from tunewright.runs.report.next_step import next_step
from tunewright.runs.report.record import read

SWEEP = {
    "metric": {"name": "accuracy", "proportion": True, "higher_is_better": True},
    "sweep": [
        {"strength": 0.75, "value": 0.9, "against_full": {"n": 300, "difference": -0.004, "ci95": [-0.012, 0.004]},
         "kept": {"name": "stories", "n": 120, "difference": 0.31, "ci95": [0.12, 0.5], "value": 2.0}},
        {"strength": 1.0, "value": 0.904, "against_full": {"n": 300, "difference": 0.0, "ci95": [0, 0]},
         "kept": {"name": "stories", "n": 120, "difference": 0.0, "ci95": [0, 0], "value": 2.3}},
    ],
    "recommended": {"strength": 0.75, "why": "stories clearly improve",
                    "command": "tunewright merge tickets --base-share 0.25"},
}  # fmt: skip
WEST = {"value": "west", "n": 120, "base": 0.8, "tuned": 0.7, "difference": -0.1, "ci95": [-0.17, -0.03],
        "changed": "worse", "few": False}  # fmt: skip
GROUPS = {"proportion": True, "columns": [{"column": "region", "groups": [WEST]}]}
PROBE = {"n": 120, "base": 0.8, "tuned": 0.7, "difference": -0.1, "ci95": [-0.16, -0.04], "broken": 15, "fixed": 3,
         "base_knows": True}  # fmt: skip
CALIBRATION = {"tuned": {"ece": 0.08, "floor_p95": 0.04, "calibrated": False}, "too_sure": {"tuned": 0.06},
               "temperature": {"n": 200, "tuned": {"value": 1.53, "ece": 0.03}}}  # fmt: skip
MESSY = {"proportion": True, "n": 150, "severities": [{}, {"gain": {"difference": -0.1, "ci95": [-0.2, -0.04]}}]}


def gauges(run: Path, **found: dict[str, Any]) -> Path:
    (run / "gauges").mkdir(exist_ok=True)
    for name, value in found.items():
        write(run / "gauges", f"{name}.json", value)
    return run


def verdict(run: Path, answer: str) -> Path:
    edit(run, "evidence.json", verdict={"answer": answer, "sentence": f"Said: {answer}.", "margin": 0.02})
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return text_run(tmp_path, flips=6)


@pytest.mark.parametrize(
    ("answer", "found", "do"),
    [
        ("no verdict", {"changed": SWEEP, "groups": GROUPS}, "Do not decide yet."),
        ("worse", {"changed": SWEEP, "groups": GROUPS}, "Do not use it: keep what you had."),
        ("trade", {"changed": SWEEP, "groups": GROUPS}, "If you take this trade, take it at 75% strength."),
        ("better", {"changed": SWEEP, "groups": GROUPS, "probe": PROBE}, "Use it at 75% strength."),
        ("trade", {"groups": GROUPS}, "Decide which matters more to you."),
        ("can't tell", {"groups": GROUPS}, "Do not use it yet: nothing shows that it beats the base (zero-shot)."),
        ("no meaningful change", {"groups": GROUPS}, "Keep the base."),
        ("better", {"groups": GROUPS, "probe": PROBE}, "Do not use it for region west yet."),
        ("better", {"probe": PROBE}, "Use it for this task alone."),
        ("better", {}, "Use it if you can live with what broke."),
        ("a new word", {}, ""),
    ],
)
def test_the_most_useful_step_comes_first_in_the_stated_order(
    run: Path, answer: str, found: dict[str, Any], do: str
) -> None:
    step = next_step(read(gauges(verdict(run, answer), **found)))
    assert step["do"] == do
    assert step["why"]


def test_a_strength_is_recommended_with_its_figures_and_its_command(run: Path) -> None:
    step = next_step(read(gauges(run, changed=SWEEP)))
    assert step["command"] == "tunewright merge tickets --base-share 0.25"
    assert "stories +0.31 (120 rows, 95% interval +0.12\u00a0to\u00a0+0.5)" in step["why"]
    assert "your task \u22120.4 points (300 rows" in step["why"]
    assert "tunewright merge tickets --base-share 0.25" in Page(report(run)).text


def test_a_strength_of_one_is_no_step(run: Path) -> None:
    full = SWEEP | {"recommended": {"strength": 1.0, "why": "nothing speaks for less"}}
    assert next_step(read(gauges(run, changed=full)))["do"] == "Use it if you can live with what broke."


def test_a_model_that_broke_nothing_may_be_used(run: Path) -> None:
    edit(run, "evidence.json", flips={"fixed": 40, "broken": 0, "kept_right": 400, "still_wrong": 60, "examples": []})
    assert next_step(read(run))["do"] == "Use it."


def test_what_stands_in_the_way_of_use_is_said_below_the_step(run: Path) -> None:
    hints = next_step(read(gauges(run, calibration=CALIBRATION, robustness=MESSY)))["also"]
    assert hints[0].startswith(
        "With 150 rows made messy on purpose, as much as our edits go, it falls behind the base (\u221210.0"
    )
    assert (
        "on average 8.0 points away from how often it is right (too sure); chance alone would show up to 4.0 points"
        in hints[1]
    )
    assert "A temperature of 1.53" in hints[1]
    calm = CALIBRATION | {"tuned": {"ece": 0.03, "floor_p95": 0.04, "calibrated": True}}
    assert next_step(read(gauges(run, calibration=calm, robustness={"not_run": "x"})))["also"] == []


# ---------------------------------------------------------------- what it cost elsewhere
def test_general_questions_and_movement_are_said_where_no_rows_were_named(run: Path) -> None:
    task = [m for m in read(run).evidence["measures"] if m["about"] == "task"]
    edit(run, "evidence.json", measures=task)
    moved = {"name": "KL on neutral texts", "on": "neutral texts", "unit": "nats a token", "n": 200, "value": 0.1234,
             "ci95": [0.11, 0.13], "same_next_word": 0.912}  # fmt: skip
    gauges(run, probe=PROBE, divergence={"gauges": [{"name": "x", "not_run": "no"}, moved]})
    said = elsewhere(read(run))
    change = "(\u221210.0 points, 95% interval \u221216.0 to \u22124.0)"
    assert said[0] == f"Of 120 general questions it broke 15 and fixed 3 {change}: worse."
    assert said[1].startswith(
        "How far it moved, which is no loss by itself: KL on neutral texts, on 200 neutral texts, "
        "0.123 nats a token (95% interval 0.11 to 0.13)."
    )
    assert "At 91.2% of places it expects the same next word." in said[1]
    assert "forg" not in " ".join(said)


def test_a_base_that_knew_nothing_lost_nothing(run: Path) -> None:
    said = elsewhere(read(gauges(run, probe=PROBE | {"base_knows": False})))
    assert any("no better than chance" in line for line in said)


def test_nothing_measured_is_said_to_be_so(run: Path) -> None:
    edit(run, "evidence.json", measures=[], verdict={"answer": "better", "sentence": "x", "not_measured": []})
    assert elsewhere(read(run)) == ["not measured: no rows of other skills were given (evaluate.general)"]


@pytest.mark.parametrize("damage", [{}, [], {"recommended": 3, "sweep": "x"}, {"columns": [3, {"groups": [None]}]}])
def test_a_gauge_of_another_shape_stops_no_page(run: Path, damage: Any) -> None:
    every = ("changed", "groups", "probe", "calibration", "robustness", "divergence")
    assert Page(report(gauges(run, **dict.fromkeys(every, damage)))).faults == []


def test_a_group_that_fell_behind_is_said_on_the_first_screen(run: Path) -> None:
    gap = {
        "base": 0.01,
        "tuned": 0.27,
        "change": 0.26,
        "ci95": [0.13, 0.31],
        "chance_p95": {"base": 0.09, "tuned": 0.08},
    }
    rows = [{"value": v, "n": 250, "base": 0.45, "tuned": t} for v, t in (("long", 0.85), ("short", 0.58))]
    column = {"column": "length", "groups": rows, "worst": {"base": "short", "tuned": "short"}, "gap": gap}
    hints = next_step(read(gauges(run, groups={"proportion": True, "columns": [column]})))["also"]
    assert hints[0] == (
        "Uneven: length short stands at 58.0% (250 rows), 27.0 points behind the best group; the base's gap was "
        "smaller (by 13.0 points to 31.0 points)."
    )
    even = column | {"gap": gap | {"ci95": [-0.02, 0.31]}}
    assert not any("Uneven" in h for h in next_step(read(gauges(run, groups={"columns": [even]})))["also"])
    small = column | {"gap": gap | {"tuned": 0.07}}
    assert not any("Uneven" in h for h in next_step(read(gauges(run, groups={"columns": [small]})))["also"])
