"""Several runs on one page: the pairs against known numbers, the plot against its scales, and data that stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import PAYLOADS, Page, edit, text_run, write

from tunewright import cli
from tunewright.errors import RunError
from tunewright.metrics import statistics
from tunewright.runs.report import side_by_side
from tunewright.runs.report.page import LIMIT
from tunewright.runs.report.record import read
from tunewright.uses.comparison import compare, differing

N = 200
RECIPE = (
    "model: {checkpoint: a/b}\ntask: {name: text-classification}\nmethod: {name: head}\ndata: {train: tickets.jsonl}\n"
)


def finished(folder: Path, wrong: set[int], rows: int = N, name: str = "refund") -> Path:
    """A finished run with `rows` test rows, of which the tuned model has `wrong` wrong. Every number is made up."""
    folder.mkdir()
    text_run(folder, flips=5)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "README.md").write_text("done", encoding="utf-8")
    scores = [
        {
            "row": f"tickets.jsonl:{i}",
            "split": "test",
            "metric": "accuracy",
            "base": 0.5,
            "tuned": float(i not in wrong),
        }
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(scores), folder / "scores.parquet")
    said = [{"row": line["row"], "truth": "delivery", "base": {"label": "other"},
             "tuned": {"label": "delivery" if line["tuned"] else name}} for line in scores]  # fmt: skip
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said), encoding="utf-8")
    evidence = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    evidence["measures"][0].update(tuned=1 - len(wrong) / rows, difference=0.49 - len(wrong) / rows, n=rows)
    write(folder, "evidence.json", evidence)
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    data["files"][0]["split"] = "train+test"
    write(folder, "data.json", data)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """The second is the best; the first is clearly behind it, the third by a hair."""
    return [
        finished(tmp_path / "one", set(range(60))),
        finished(tmp_path / "two", set(range(20))),
        finished(tmp_path / "three", set(range(19)) | {50, 51, 52}, name="cancel"),
    ]


def written(runs: list[Path], out: Path) -> str:
    return side_by_side.write_side_by_side(compare(runs), differing(runs), runs, out).read_text(encoding="utf-8")


def test_every_run_is_held_against_the_best_with_one_correction_for_all(runs: list[Path]) -> None:
    table = compare(runs)
    assert table["best"] == 1
    pairs = {pair["run"]: pair for pair in table["against_best"]}
    assert set(pairs) == {0, 2}
    assert pairs[0]["difference"] == pytest.approx(-0.2)
    assert pairs[0]["ci95"] == pytest.approx(statistics.tango_interval(0, 40, N), abs=1e-9)
    assert pairs[0]["p"] == pytest.approx(statistics.mcnemar_midp(0, 40))
    assert pairs[0]["p_holm"] == pytest.approx(min(1.0, 2 * pairs[0]["p"]))  # by hand: two pairs, the smaller p first
    assert pairs[2]["p_holm"] == pytest.approx(max(2 * pairs[0]["p"], pairs[2]["p"]))
    assert [score["ci95"] for score in table["scores"]][1] == pytest.approx(statistics.wilson_interval(180, N))


def test_the_headline_names_what_cannot_be_told_apart(runs: list[Path], tmp_path: Path) -> None:
    assert "B · two scores highest, but these rows cannot tell it from C · three" in written(runs, tmp_path / "c.html")
    assert "A · two is better than the other run" in written([runs[1], runs[0]], tmp_path / "d.html")


def test_the_rows_on_which_they_differ_are_all_and_only_those(runs: list[Path]) -> None:
    found = differing(runs)
    assert {line["row"] for line in found} == {f"tickets.jsonl:{i}" for i in range(60)}
    right = [sum(line["scores"]) for line in found]
    assert right == sorted(right, reverse=True)
    known = [line for line in found if line["input"] is not None]
    assert 0 < len(known) < len(found), "an example's text is taken from a run that kept it"


def test_the_page_is_safe_whole_and_the_same_each_time(runs: list[Path], tmp_path: Path) -> None:
    source = written(runs, tmp_path / "compare.html")
    assert source == written(runs, tmp_path / "again.html")
    parsed = Page(source)
    assert parsed.faults == []
    assert not {"script", "link", "iframe", "form", "img"} & {name for name, _ in parsed.elements}
    assert "script-src 'none'" in source.replace("&#39;", "'")
    assert "its text stands in the data" in parsed.text
    assert not re.search(r">\s*(null|None|nan)\s*<", source)
    assert len(source.encode()) < LIMIT


@pytest.mark.promise(15)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_data_stays_text_here_too(runs: list[Path], tmp_path: Path, payload: str) -> None:
    table, rows = compare(runs), differing(runs)
    clean = {name for name, _ in Page(written(runs, tmp_path / "clean.html")).elements}
    for line in table["runs"]:
        line.update(run=line["run"] + payload, method=payload, baseline=payload)
    for row in rows:
        row.update(input=payload, truth=payload, answers=[payload] * 3, row=payload)
    source = side_by_side.render(table, rows, [read(run) for run in runs])
    parsed = Page(source)
    assert parsed.faults == []
    assert {name for name, _ in parsed.elements} <= clean
    assert not [key for _, a in parsed.elements for key in a if key.startswith("on") or key in ("autofocus", "srcdoc")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", source)


# ---------------------------------------------------------------- gain against forgetting
def test_kept_rows_go_before_questions_and_questions_before_movement(runs: list[Path]) -> None:
    gauge = {"gauges": [{"name": "KL", "on": "texts", "unit": "nats", "value": 0.1, "ci95": [0.08, 0.12]}]}
    probe = {"n": 120, "difference": -0.05, "ci95": [-0.1, 0.0], "base": 0.5, "tuned": 0.45}
    found = side_by_side.forgetting([read(run) for run in runs])
    assert found is not None
    assert found.label == "change of accuracy"
    assert found.values[0] == pytest.approx((-0.0033, -0.0166, 0.0098))
    for run in runs:
        evidence = read(run).evidence
        edit(run, "evidence.json", measures=[m for m in evidence["measures"] if m["about"] == "task"])
        (run / "gauges").mkdir()
        write(run / "gauges", "probe.json", probe)
        write(run / "gauges", "divergence.json", gauge)
    asked = side_by_side.forgetting([read(run) for run in runs])
    assert asked is not None
    assert asked.label == "general questions"
    (runs[0] / "gauges" / "probe.json").unlink()  # one run was not asked: the axis must be one that all have
    moved = side_by_side.forgetting([read(run) for run in runs])
    assert moved is not None
    assert "further is not worse by itself" in moved.note
    assert moved.values[0] == (0.1, 0.08, 0.12)
    (runs[1] / "gauges" / "divergence.json").unlink()
    assert side_by_side.forgetting([read(run) for run in runs]) is None


def test_a_cross_stands_where_its_values_say(runs: list[Path], tmp_path: Path) -> None:
    for run, kept in zip(runs, (-0.2, -0.1, 0.0), strict=True):
        measures = read(run).evidence["measures"]
        general = next(m for m in measures if m["about"] == "general")
        general.update(difference=kept, ci95=[kept - 0.02, kept + 0.02])
        edit(run, "evidence.json", measures=measures)
    source = written(runs, tmp_path / "c.html")
    plot = source[source.index("one cross a run") :]
    dots = re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)" r="6"', plot)[:3]
    across, height = ([float(dot[i]) for dot in dots] for i in (0, 1))
    assert across == sorted(across)
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.05)
    assert height[0] > height[2] > height[1], "the higher the gain, the higher the cross"


# ---------------------------------------------------------------- the command
def test_report_of_several_writes_one_page(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *map(str, runs)]) == 0
    assert (tmp_path / "compare.html").is_file()
    assert cli.main(["report", *map(str, runs), "--out", "pages/all.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"report": "pages/all.html"}
    assert (tmp_path / "pages" / "all.html").read_bytes() == (tmp_path / "compare.html").read_bytes()
    assert cli.main(["report", str(runs[0]), "--out", "x.html"]) == 2


def test_runs_on_other_rows_are_refused_with_the_reason(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="shares 100 of 100 test rows"):
        compare([runs[0], finished(tmp_path / "short", set(), rows=100)])


def test_a_metric_whose_less_is_more_names_the_lowest_best() -> None:
    from tunewright.uses.comparison import _against_best

    found: dict[str, Any] = _against_best(
        [[2.0] * 60, [1.0 + i % 3 for i in range(60)], [0.5 + i % 2 for i in range(60)]], -1.0
    )
    assert found["best"] == 2
