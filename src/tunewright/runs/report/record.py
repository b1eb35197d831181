"""Reads a run folder for the report: what is there, what is not and why, and every measure said in words.

Knows file names and their fields, never how they were made. Text is cleaned here, once: no control characters, no
lone surrogates. It is not escaped here; that is the page's and the card's work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewright.errors import Fault, RunError
from tunewright.runs.report import words

OPTIONAL = ("data.json", "environment.json", "usage.json", "solved.json", "seeds.json", "learning_curve.json")
LISTS = ("metrics.jsonl", "evaluations.jsonl")
DEFAULT_MARGIN = 0.02  # two points, as in docs/what-the-verdict-means.md; never derived from the number of rows
ALPHA = 0.05
FEW_ROWS = 20  # a group below this is shown in grey: its interval is wider than any verdict
SHARES = frozenset({"accuracy", "macro_f1", "exact_match"})  # said in points even where `proportion` is absent
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
SURROGATE = re.compile("[\ud800-\udfff]")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Record:
    """What a run folder says. `missing` names each absent or unreadable file with the reason."""

    folder: Path
    evidence: dict[str, Any]
    files: dict[str, Any]
    missing: dict[str, str]
    recipe: str = ""
    gauges: dict[str, dict[str, Any]] = field(default_factory=dict)

    def gauge(self, name: str) -> tuple[dict[str, Any], str]:
        """(what the gauge found, "") or ({}, why it did not run)."""
        found = self.gauges.get(name)
        if found is None:
            reason = self.missing.get(f"gauges/{name}.json") or _absent(f"gauges/{name}.json")
            return {}, f"{reason}; `tunewright evaluate RUN --gauges` measures it"
        return ({}, str(found["not_run"])) if "not_run" in found else (found, "")

    def part(self, file: str) -> dict[str, Any]:
        """The JSON object in `file`; {} where it is missing."""
        return mapping(self.files.get(file))

    def lines(self, file: str) -> list[dict[str, Any]]:
        """The objects in the JSON-lines `file`; [] where it is missing."""
        return [mapping(line) for line in sequence(self.files.get(file))]

    @property
    def name(self) -> str:
        return str(self.part("usage.json").get("name") or clean(self.folder.resolve().name))

    @property
    def verdict(self) -> dict[str, Any]:
        return mapping(self.evidence.get("verdict"))

    @property
    def margin(self) -> float:
        margin = self.verdict.get("margin")
        return float(margin) if words.is_number(margin) else DEFAULT_MARGIN

    @property
    def measures(self) -> list[Measure]:
        return [Measure.read(row, self.margin) for row in map(mapping, sequence(self.evidence.get("measures")))]

    @property
    def base_id(self) -> str:
        """The base's hub id, or "" where it is a folder of this machine or cannot be told apart from one."""
        base = mapping(self.part("usage.json").get("base"))
        checkpoint = str(base.get("checkpoint") or "")
        named = HUB_ID.fullmatch(checkpoint) and not Path(checkpoint).exists()
        return checkpoint if named and ("/" in checkpoint or base.get("revision")) else ""

    @property
    def base_name(self) -> str:
        """The base for a headline: its hub id, or the last name of its folder."""
        checkpoint = str(mapping(self.part("usage.json").get("base")).get("checkpoint") or "")
        return self.base_id or checkpoint.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Measure:
    """One line of `measures` in evidence.json: base against tuned on the same rows."""

    key: str  # the bare metric, `macro_f1`
    name: str  # as it is said, `macro F1`
    about: str = "task"
    n: int | None = None
    baseline: str = ""
    base: float | None = None
    tuned: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None  # corrected for the measures asked beside it; the declared one has none
    higher_is_better: bool = True
    in_points: bool = False  # the value is a share in [0, 1]; differences are said in points
    method: str = ""
    margin: float = field(default=DEFAULT_MARGIN)

    @classmethod
    def read(cls, row: Mapping[str, Any], margin: float) -> Measure:
        interval = [*sequence(row.get("ci95")), None, None][:2]
        base, tuned, difference = (_finite(row.get(key)) for key in ("base", "tuned", "difference"))
        if difference is None and base is not None and tuned is not None:
            difference = tuned - base
        low, high = map(_finite, interval)
        key = str(row.get("name") or "measure")
        group = row.get("group")
        place = f", {group}" if group else f" on {row['set']}" if row.get("set") else ""
        rows = row.get("n")
        return cls(
            key=key, name=words.name(key) + place, about=str(row.get("about") or "task"),
            n=int(rows) if words.is_number(rows) else None, baseline=str(row.get("baseline") or ""),
            base=base, tuned=tuned, difference=difference,
            low=None if high is None else low, high=None if low is None else high, p=_finite(row.get("p")),
            p_holm=_finite(row.get("p_holm")),
            higher_is_better=row.get("higher_is_better") is not False,
            in_points=bool(row.get("proportion", key in SHARES)),
            method=str(row.get("method") or ""), margin=margin,
        )  # fmt: skip

    @property
    def finding(self) -> str:
        """What the interval allows to say, in words fixed before any result was seen."""
        if self.difference is None or self.low is None or self.high is None:
            return "no interval"
        low, high = (self.low, self.high) if self.higher_is_better else (-self.high, -self.low)
        if self.p_holm is not None and self.p_holm > ALPHA:  # interval and test must agree, as in evidence/verdict.py
            low, high = min(low, 0.0), max(high, 0.0)
        margin = self.margin  # in the metric's own unit, as evidence/verdict.py reads it
        if -margin <= low and high <= margin:
            tiny = "a real but tiny gain" if low > 0 else "a real but tiny loss" if high < 0 else ""
            return tiny or "no meaningful change"
        if low > 0:
            return "clearly better" if low > margin else "better"
        return "worse" if high < 0 else "can't tell"

    @property
    def direction(self) -> str:
        """`better`, `worse` or `unclear`: what colour and shape a chart gives it."""
        return {"clearly better": "better", "better": "better", "worse": "worse"}.get(self.finding, "unclear")

    def shown(self, value: float | None) -> str:
        return words.share(value) if self.in_points else words.number(value)

    @property
    def shown_difference(self) -> str:
        return words.points(self.difference) if self.in_points else words.change(self.difference)

    @property
    def interval(self) -> str:
        """`+4.8 to +11.8`, or "" where there is none."""
        if self.low is None or self.high is None:
            return ""
        if self.in_points:
            return f"{words.points(self.low, unit=False)} to {words.points(self.high, unit=False)}"
        return f"{words.change(self.low)} to {words.change(self.high)}"


def read(run: Path) -> Record:
    """Read everything the report uses. Raises RunError if evidence.json, the one thing it cannot do without, fails."""
    files: dict[str, Any] = {}
    missing: dict[str, str] = {}
    evidence = _evidence(run)
    for file in OPTIONAL:
        files[file], missing[file] = _object(run / file)
    for file in LISTS:
        files[file], missing[file] = _lines(run / file)
    gauges: dict[str, dict[str, Any]] = {}
    for path in sorted((run / "gauges").glob("*.json")):
        value, missing[f"gauges/{path.name}"] = _object(path)
        gauges |= {path.stem: value} if value is not None else {}
    recipe = ""
    if (run / "recipe.yaml").is_file():
        recipe = clean((run / "recipe.yaml").read_text(encoding="utf-8", errors="replace"))
    else:
        missing["recipe.yaml"] = _absent("recipe.yaml")
    return Record(run, evidence, files, {file: reason for file, reason in missing.items() if reason}, recipe, gauges)


def clean(value: Any) -> Any:
    """The same value with control characters and lone surrogates taken out of every text in it, keys included."""
    if isinstance(value, str):
        text = value.replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
        return SURROGATE.sub("\ufffd", CONTROL.sub("", text))
    if isinstance(value, dict):
        return {clean(str(key)): clean(entry) for key, entry in value.items()}
    return [clean(entry) for entry in value] if isinstance(value, list) else value


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else []


def _finite(value: Any) -> float | None:
    return float(value) if words.is_number(value) else None


def _absent(file: str) -> str:
    return f"the run folder has no {file}"


def _evidence(run: Path) -> dict[str, Any]:
    path = run / "evidence.json"
    if not path.is_file():
        raise RunError(Fault("nothing to report on", where=str(path), expected="the evidence of a finished run",
                             got="no such file", remedy="Run `tunewright compare` on this run first."))  # fmt: skip
    value, problem = _object(path)
    if problem:
        raise RunError(Fault(problem, where=str(path), remedy="Run `tunewright compare` again to rewrite it."))
    return mapping(value)


def _object(path: Path) -> tuple[Any, str]:
    """(value, "") or (None, why not)."""
    if not path.is_file():
        return None, _absent(path.name)
    try:
        value = clean(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        return None, f"{path.name} cannot be read: {clean(str(error))}"
    return (value, "") if isinstance(value, dict) else (None, f"{path.name} does not hold one JSON object")


def _lines(path: Path) -> tuple[list[Any], str]:
    """The objects that can be read, and why others cannot. A run killed while writing leaves half a last line."""
    if not path.is_file():
        return [], _absent(path.name)
    rows: list[Any] = []
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    ):  # splitlines would cut at U+2028 in a text
        try:
            rows.append(clean(json.loads(line))) if line.strip() else None
        except (ValueError, RecursionError):
            broken += 1
    if broken:
        return rows, f"left out of {path.name}: {words.plural(broken, 'line')} that cannot be read"
    return (rows, "") if rows else (rows, f"{path.name} is empty")
