"""The model card: a run folder becomes `README.md` with Hugging Face front matter and the verdict in plain words.

Knows what a card says, nothing of the page. Front matter holds only keys whose value is known. Neither `model-index`
nor the hub's newer `.eval_results/*.yaml` has a field for n or an interval, so both stand in names and notes.
https://huggingface.co/docs/hub/eval-results (the newer format: only for test rows that are a data set on the hub).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunewright.rundir import RunDir
from tunewright.runs.report import first, history, page, words
from tunewright.runs.report.record import Measure, Record, mapping, read, sequence

MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")
PEFT = "peft"
EVAL_FILE = "tunewright.yaml"
HUB_DATA = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(#(?P<config>[^:]*))?(:(?P<split>.*))?")


def write_card(run: Path) -> Path:
    """Write `README.md` into the run folder and return its path. Raises RunError if evidence.json is not readable."""
    record = read(run)
    matter = yaml.safe_dump(front_matter(record), sort_keys=False, allow_unicode=True, width=100)
    if entries := eval_results(record):
        (run / ".eval_results").mkdir(exist_ok=True)
        text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=100)
        RunDir(run).write_text(f".eval_results/{EVAL_FILE}", text)
    RunDir(run).write_text("README.md", f"---\n{matter}---\n\n{body(record)}")
    return run / "README.md"


def eval_results(record: Record) -> list[dict[str, Any]]:
    """The task's scores as the hub's `EvalResultEntry` has them; [] where the test rows are no data set on the hub.

    `dataset.id` must name a data set there: a private file has no such name, and rows held out of training data are
    no benchmark. No date stands in it: the same run, the same bytes.
    """
    place = _test_place(record)
    found = HUB_DATA.fullmatch(place)
    if found is None or _tested(record).get("format") != "hub" or Path(place).exists():
        return []
    dataset = {"id": found["id"], "task_id": found["config"] or "default"}
    return [
        {"dataset": dataset, "value": m.tuned, "notes": f"{m.key}; {_explained(m)}; tuned and measured by Tunewright"}
        for m in record.measures if m.about == "task" and m.tuned is not None
    ]  # fmt: skip


def _test_place(record: Record) -> str:
    """What the recipe calls `data.test`; "" where it names none."""
    try:
        recipe = mapping(yaml.safe_load(record.recipe))
    except yaml.YAMLError:
        return ""
    return str(mapping(recipe.get("data")).get("test") or "")


def _explained(measure: Measure) -> str:
    """n, what stood there before, and the interval of the difference: what a bare score leaves out."""
    rows = f"{words.plural(measure.n, 'held-out row')}" if measure.n else "held-out rows"
    before = f"before {measure.shown(measure.base)}" + (f" ({measure.baseline})" if measure.baseline else "")
    reach = f", 95% interval {measure.interval}" if measure.interval else ""
    return f"{rows}; {before}; difference {measure.shown_difference}{reach}"


def _tested(record: Record) -> dict[str, Any]:
    """The file that the test rows came from."""
    files = [mapping(file) for file in sequence(record.part("data.json").get("files"))]
    return next(iter([file for file in files if "test" in str(file.get("split")).split("+")] or files), {})


def front_matter(record: Record) -> dict[str, Any]:
    """The card's metadata; a key is there only if its value is known."""
    usage = record.part("usage.json")
    library, pipeline = usage.get("library"), usage.get("pipeline")
    measures = [m for m in record.measures if m.about == "task" and m.tuned is not None]
    results = [_result(record, str(pipeline), measures)] if pipeline and measures else []
    matter: dict[str, Any] = {
        "library_name": library,
        "base_model": record.base_id,
        "base_model_relation": ("adapter" if library == PEFT else "finetune") if record.base_id else "",
        "pipeline_tag": pipeline,
        "tags": [str(tag) for tag in ("tunewright", usage.get("task"), usage.get("method")) if tag],
        "metrics": list(dict.fromkeys(m.key for m in measures)),
        "model-index": [{"name": record.name, "results": results}] if results else [],
    }
    return {key: value for key, value in matter.items() if value}


def _result(record: Record, pipeline: str, measures: Sequence[Measure]) -> dict[str, Any]:
    """The tuned scores in the shape of `model-index`, named by the file that they were measured on."""
    tested = _tested(record)
    rows = f"held-out rows of {Path(str(tested['file'])).name}" if tested.get("file") else "held-out rows"
    scores = [
        {"type": m.key, "value": m.tuned, "name": f"{m.name} ({_explained(m)})"}
        for m in measures
    ]  # fmt: skip
    dataset = {"name": rows, "type": str(tested.get("format") or "custom")}
    return {"task": {"type": pipeline}, "dataset": dataset, "metrics": scores}


def body(record: Record) -> str:
    """The card's text: verdict, scores, data, use, limits, cost, making."""
    usage = record.part("usage.json")
    base = record.base_name or "a base that the run does not name"
    about = [f"{key}: {plain(usage[key])}" for key in ("task", "method") if usage.get(key)]
    opening = f"{plain(base)}, tuned with Tunewright" + (f" ({', '.join(about)})." if about else ".")
    verdict, made = record.verdict, history.made(record)
    parts = [
        f"# {plain(record.name)}",
        opening,
        f"**{plain(words.sentence(verdict.get('sentence') or 'No verdict: the evidence holds none.'))}**",
        *(plain(words.capital(line)) for line in first.elsewhere(record)),
        "How sure: " + " ".join(plain(line) for line in first.how_sure(record)),
        "## Scores", _scores(record), plain(page.baseline(record)),
        "## Data", _data(record),
        "## How to use it", _use(usage, record),
        "## Limits", _bullets(_limits(record)),
        "## Cost", _pairs(history.cost(record)["facts"]),
        "## How it was made", _pairs(made["facts"]) or plain(made["answer"]),
        "The whole evidence, row by row, is in `report.html` and `evidence.json` of the run folder.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(value: Any) -> str:
    """Text that Markdown shows as it is: one line, its signs escaped, no HTML."""
    line = " ".join(str(value).split())
    return MARKDOWN.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _scores(record: Record) -> str:
    lines = [
        "| measure | about | rows | base | tuned | difference | 95% interval | finding |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for m in record.measures:
        cells = (
            m.name,
            m.about,
            words.count(m.n),
            m.shown(m.base),
            m.shown(m.tuned),
            m.shown_difference,
            m.interval or words.UNKNOWN,
            m.finding,
        )
        lines.append("| " + " | ".join(plain(cell) for cell in cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "not measured: the evidence holds no measure"


def _data(record: Record) -> str:
    view = history.data(record)
    files = [mapping(file) for file in sequence(record.part("data.json").get("files"))]
    named = [
        f"{plain(f.get('file', ''))} ({plain(f.get('split') or 'all')}): {words.count(f.get('rows_kept'))} of "
        f"{words.plural(f.get('rows_read'), 'row')} kept, SHA-256 {plain(str(f.get('sha256') or words.UNKNOWN)[:16])}"
        for f in files[:20]
    ]  # fmt: skip
    more = [f"{len(files) - 20} more files"] if len(files) > 20 else []
    facts = [f"{plain(term)}: {plain(value)}" for term, value in view["facts"]]
    return "\n\n".join(
        part for part in (plain(view["answer"]), _bullets([*named, *more, *facts, *map(plain, view["notes"])])) if part
    )


def _use(usage: dict[str, Any], record: Record) -> str:
    load, predict = ("\n".join(map(str, sequence(usage.get(key)))) for key in ("load", "predict"))
    parts = [_code(load, "python")] if load else []
    parts += [_code(predict, "bash")] if predict else []
    return "\n\n".join(parts) or f"not measured: {plain(record.missing.get('usage.json', 'usage.json holds no lines'))}"


def _code(lines: str, language: str) -> str:
    """A fenced block; the fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"


def _limits(record: Record) -> list[str]:
    view = page.limits(record)
    licence = "No licence is set here: the base's licence and that of the data apply."
    return [*(f"not measured: {plain(line)}" for line in view["not_measured"]), *map(plain, view["fixed"]), licence]


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    return _bullets(f"{plain(term)}: {plain(value)}" for term, value in pairs)
