"""How it learned, from what, at what cost, how it is used and how it was made: the parts that retell the run's files.

Knows the files of a run folder as record.py reads them; judges nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunewright.runs.report import charts, words
from tunewright.runs.report.record import Measure, Record, mapping, sequence

ENVIRONMENT = ("tunewright", "commit", "python", "torch", "transformers", "platform", "device", "threads", "precision",
               "precision_reason", "seed")  # fmt: skip


# ---------------------------------------------------------------- how did it learn?
def learning(record: Record) -> dict[str, Any]:
    """Training loss and what was measured on validation on the way; a closed-form head has no steps and says so."""
    solved = record.part("solved.json").get("text")
    steps = _points(record.lines("metrics.jsonl"), "loss")
    notes = [
        record.missing[file]
        for file in ("metrics.jsonl", "evaluations.jsonl")
        if "left out" in record.missing.get(file, "")
    ]
    if solved and not steps:
        return {"answer": "Solved in closed form: there are no steps.", "figures": [], "notes": [str(solved), *notes]}
    figures = [_loss_figure(record, steps)] if steps else [_absent(record, "metrics.jsonl", "training loss")]
    evaluated = _evaluated(record)
    figures += [_evaluation_figure(record, key) for key in evaluated]
    if not evaluated:
        figures.append(_absent(record, "evaluations.jsonl", "scores on validation rows during training"))
    answer = _fell(steps) if steps else f"not measured: {record.missing.get('metrics.jsonl', 'no loss was logged')}"
    return {"answer": answer, "figures": figures, "notes": notes}


def _absent(record: Record, file: str, what: str) -> Markup:
    return charts.tag(
        "p", f"not measured: {what} ({record.missing.get(file) or f'{file} holds none'})", class_="absent"
    )


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    points = [
        (float(line["step"]), float(line[key]))
        for line in lines
        if words.is_number(line.get("step")) and words.is_number(line.get(key))
    ]
    return tuple(sorted(points))


def _fell(points: Sequence[tuple[float, float]]) -> str:
    smooth = charts.running_mean(charts.thin(points)) if len(points) > 20 else points
    first, last = smooth[0][1], smooth[-1][1]
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    steps = words.plural(int(points[-1][0]), "step")
    return f"Training loss {verb} from {words.number(first)} to {words.number(last)} in {steps}."


def _loss_figure(record: Record, steps: tuple[tuple[float, float], ...]) -> Markup:
    series = [charts.Series("training loss", "training", steps)]
    held_out = _points(record.lines("evaluations.jsonl"), "loss")
    series += [charts.Series("validation loss", "validation", held_out)] if held_out else []
    numbers = charts.table(
        ("step", "training loss"), [(words.count(x), words.number(y)) for x, y in charts.thin(steps, 24)], (0, 1)
    )
    return charts.figure(_fell(steps), charts.curve(series, "Loss over steps", share=False), numbers, _legend(series))


def _legend(series: Sequence[charts.Series]) -> Markup:
    said = {"training": "solid line: {}", "validation": "dashed line with dots: {}"}
    lines = [said[line.kind].format(line.name) for line in series]
    if any(line.kind == "training" and len(line.points) > 20 for line in series):
        lines.append("thin line: every logged step")
    return charts.tag("p", words.capital("; ".join(lines)) + ".", class_="key")


def _evaluated(record: Record) -> list[str]:
    """Up to three metrics of evaluations.jsonl, the verdict's own first; loss stands beside the training loss."""
    lines = record.lines("evaluations.jsonl")
    keys = list(dict.fromkeys(key for line in lines for key, value in line.items() if words.is_number(value)))
    wanted = [str(mapping(m).get("name")) for m in sequence(record.evidence.get("measures"))]
    left = [key for key in keys if key not in ("step", "epoch", "seconds", "n", "loss")]
    return sorted(left, key=lambda key: (wanted.index(key) if key in wanted else len(wanted), keys.index(key)))[:3]


def _evaluation_figure(record: Record, key: str) -> Markup:
    lines = record.lines("evaluations.jsonl")
    splits = list(dict.fromkeys(str(line.get("split") or "validation") for line in lines))
    splits = [split for split in splits if split != "train"][:1] or splits[:1]
    points = _points([line for line in lines if str(line.get("split") or "validation") in splits], key)
    if not points:
        return _absent(record, "evaluations.jsonl", words.name(key))
    twin = Measure.read({"name": key, **_same_name(record, key)}, record.margin)
    ends = f"from {twin.shown(points[0][1])} to {twin.shown(points[-1][1])}"
    best = max(points, key=lambda p: p[1] if twin.higher_is_better else -p[1])
    what = f"{words.name(key)} on {splits[0]} rows"
    message = f"{words.capital(what)} went {ends}; best {twin.shown(best[1])} at step {words.count(best[0])}."
    series = charts.Series(what, "validation", points)
    numbers = charts.table(
        ("step", words.name(key)), [(words.count(x), twin.shown(y)) for x, y in charts.thin(points, 24)], (0, 1)
    )
    picture = charts.curve([series], f"{words.name(key)} over steps", share=twin.in_points)
    return charts.figure(message, picture, numbers, _legend([series]))


def _same_name(record: Record, key: str) -> dict[str, Any]:
    return next((row for row in map(mapping, sequence(record.evidence.get("measures"))) if row.get("name") == key), {})


# ---------------------------------------------------------------- what did it learn from?
def data(record: Record) -> dict[str, Any]:
    """Files, what was dropped and why, labels, lengths, notes."""
    facts = record.part("data.json")
    if not facts:
        return {
            "answer": f"not measured: {record.missing.get('data.json', 'data.json is empty')}",
            "tables": [],
            "facts": [],
            "notes": [],
        }
    files = [mapping(file) for file in sequence(facts.get("files"))]
    kept = sum(int(file["rows_kept"]) for file in files if words.is_number(file.get("rows_kept")))
    dropped = sum(sum(int(n) for n in mapping(file.get("dropped")).values() if words.is_number(n)) for file in files)
    tables = [
        ("Files", _files(files)),
        ("Dropped rows", _dropped(files)),
        ("Labels", _labels(mapping(facts.get("labels")))),
    ]
    answer = f"{words.plural(kept, 'row')} of {words.plural(len(files), 'file')}; {words.count(dropped)} dropped"
    left_out = mapping(facts.get("left_out"))
    answer += f"; {words.count(left_out.get('rows'))} left out by the task." if left_out else "."
    return {"answer": answer, "tables": [(title, table) for title, table in tables if table],
            "facts": _data_facts(facts), "notes": [str(note) for note in sequence(facts.get("notes"))]}  # fmt: skip


def _files(files: Sequence[Mapping[str, Any]]) -> Markup:
    columns = ("file", "split", "format", "rows read", "rows kept", "SHA-256")
    lines = [
        (file.get("file", ""), file.get("split") or "all", file.get("format") or "", words.count(file.get("rows_read")),
         words.count(file.get("rows_kept")),
         charts.tag("code", str(file.get("sha256") or words.UNKNOWN)[:64], class_="hash"))
        for file in files[:50]
    ]  # fmt: skip
    more = charts.tag("p", f"{len(files) - 50} more files are in data.json.") if len(files) > 50 else Markup("")
    return charts.table(columns, lines, (3, 4)) + more if lines else Markup("")


def _dropped(files: Sequence[Mapping[str, Any]]) -> Markup:
    lines = [
        (file.get("file", ""), reason, words.count(n))
        for file in files
        for reason, n in sorted(mapping(file.get("dropped")).items())
    ]
    return charts.table(("file", "reason", "rows"), lines[:60], (2,)) if lines else Markup("<p>No row was dropped.</p>")


def _labels(labels: Mapping[str, Any]) -> Markup:
    counts = {
        split: {k: n for k, n in mapping(by).items() if words.is_number(n)}
        for split, by in labels.items()
        if mapping(by)
    }
    names = list(dict.fromkeys(name for by in counts.values() for name in by))
    if not names:
        return Markup("")
    train = counts.get("train") or next(iter(counts.values()))
    ranked = sorted(names, key=lambda name: (-train.get(name, 0), name))
    lines = [(name, *(words.count(by.get(name, 0)) for by in counts.values())) for name in ranked[:200]]
    numbers = charts.table(("label", *counts), lines, range(1, 1 + len(counts)))
    most, least = ranked[0], ranked[-1]
    ratio = (
        f", {words.number(train[most] / train[least])} times the rarest ({least}, {words.count(train[least])})"
        if train.get(least)
        else ""
    )
    ratio = ratio if len(ranked) > 1 else ""
    message = f"Training rows per label: most have {most} ({words.count(train.get(most, 0))}){ratio}."
    drawn = [(name, float(train.get(name, 0))) for name in ranked[:12]]
    message += f" The 12 most frequent of {len(ranked)} are drawn." if len(ranked) > 12 else ""
    return charts.figure(message, charts.bars(drawn, "Training rows per label"), numbers)


def _data_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What may spoil a result, said even where it is zero."""
    lengths, truncated = mapping(facts.get("lengths")), mapping(facts.get("truncated"))
    unit = str(lengths.get("unit") or "")
    said = [("Test rows also in training (removed)", _count_or_unknown(facts.get("overlap_dropped"))),
            ("Same input with different labels", _count_or_unknown(facts.get("conflicts"))),
            ("Duplicates", _duplicates(facts.get("duplicates")))]  # fmt: skip
    if lengths:
        order = (("min", "shortest"), ("median", "median"), ("p95", "95% are under"), ("max", "longest"))
        said.append(
            (
                "Length",
                ", ".join(f"{word} {words.number(lengths[key])}" for key, word in order if key in lengths) + f" {unit}",
            )
        )
    else:
        said.append(("Length", words.UNKNOWN))
    if left_out := mapping(facts.get("left_out")):
        of = words.plural(left_out.get("of"), "training row")
        said.append(("Left out by the task", f"{words.count(left_out.get('rows'))} of {of}"))
    if truncated:
        said.append(
            (
                "Cut to fit the model",
                f"{words.count(truncated.get('rows'))} of {words.plural(truncated.get('of'), 'row')}",
            )
        )
    return said


def _count_or_unknown(value: Any) -> str:
    return words.plural(value, "row") if words.is_number(value) else words.UNKNOWN


def _duplicates(value: Any) -> str:
    if words.is_number(value):
        return words.plural(value, "row")
    found = [f"{words.name(key)} {words.count(n)}" for key, n in sorted(mapping(value).items()) if words.is_number(n)]
    return ", ".join(found) or ("none" if isinstance(value, dict) else words.UNKNOWN)


# ---------------------------------------------------------------- cost, use, making, limits
def cost(record: Record) -> dict[str, Any]:
    """Time, memory and how many parameters moved."""
    facts = mapping(record.evidence.get("cost"))
    trainable, total = facts.get("trainable_parameters"), facts.get("total_parameters")
    said = [
        ("Training time", words.duration(facts.get("train_seconds"))),
        ("Peak memory", words.size(facts.get("peak_memory_bytes"))),
    ]
    if words.is_number(facts.get("predicted_peak_memory_bytes")):
        said.append(("Peak memory, predicted", words.size(facts["predicted_peak_memory_bytes"])))
    said.append(("Trainable parameters", words.large(trainable)))
    said.append(("All parameters", words.large(total)))
    if words.is_number(trainable) and words.is_number(total) and total:
        said[-2] = ("Trainable parameters", f"{words.large(trainable)} ({words.share(trainable / total)})")
    said += [(f"{words.capital(unit)} per second", words.number(facts[key])) for unit in ("rows", "tokens")
             if words.is_number(facts.get(key := f"{unit}_per_second"))]  # fmt: skip
    answer = ", ".join(words.duration(facts[k]) if k == "train_seconds" else f"{words.size(facts[k])} at peak"
                       for k in ("train_seconds", "peak_memory_bytes") if words.is_number(facts.get(k)))  # fmt: skip
    return {"answer": f"{answer}." if answer else "not measured: the evidence holds no cost", "facts": said}


def use(record: Record) -> dict[str, Any]:
    usage = record.part("usage.json")
    load = "\n".join(str(line) for line in sequence(usage.get("load")))
    predict = "\n".join(str(line) for line in sequence(usage.get("predict")))
    if not load and not predict:
        return {
            "answer": f"not measured: {record.missing.get('usage.json', 'usage.json holds no lines')}",
            "load": "",
            "predict": "",
        }
    library = str(usage.get("library") or "Python")
    return {
        "answer": f"Loads with {library}; a click selects the lines.",
        "load": load,
        "predict": predict,
        "library": library,
    }


def made(record: Record) -> dict[str, Any]:
    """Environment and recipe: what one needs to do it again."""
    environment, base = record.part("environment.json"), mapping(record.part("usage.json").get("base"))
    keys = [*ENVIRONMENT, *(key for key in environment if key not in ENVIRONMENT)]
    facts = [
        (words.capital(words.name(key)), _plain(environment[key]))
        for key in keys
        if environment.get(key) not in (None, "")
    ]
    facts += [
        (f"Base, {words.name(key)}", str(base[key])) for key in ("checkpoint", "revision", "sha256") if base.get(key)
    ]
    said = [
        f"{words.name(key)} {_plain(environment[key])}"
        for key in ("device", "precision", "seed")
        if environment.get(key) not in (None, "")
    ]
    missing = [record.missing[file] for file in ("environment.json", "recipe.yaml") if file in record.missing]
    answer = words.capital(", ".join(said) + ".") if said else f"not measured: {(missing or ['it says nothing'])[0]}"
    return {"answer": answer, "facts": facts, "recipe": record.recipe, "missing": missing}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
