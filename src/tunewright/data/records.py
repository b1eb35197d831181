"""A person's files as rows of the task: read, mapped, checked, split, with every fault and every guess named.

Knows the recipe's data section and the task's fields, never a task. Readers are found by file name in data/readers;
the whole account of what came in and what did not goes to the run's data.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright.data import inspection
from tunewright.data.columns import names
from tunewright.data.raw import Table
from tunewright.data.sources import SPLITS, Source, file_facts, name_apart, open_source, read_rows
from tunewright.data.split import nested, split
from tunewright.errors import Fault

if TYPE_CHECKING:
    from tunewright.contracts import Field, Record
    from tunewright.recipe import DataSpec

VALIDATION = 0.1  # of the training rows, where one must choose and no file is named
QUARANTINE = "Mend it, or leave such rows out: data.on_bad_row=quarantine"


@dataclass
class Data:
    """The rows of one run. `facts` is JSON-ready: what data.json holds."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    labels: tuple[str, ...]  # of the training rows, in natural order; () where the task has none
    notes: list[str]
    facts: dict[str, Any]


# ---------------------------------------------------------------- the two doors
def load(
    spec: DataSpec, fields: Mapping[str, Field], *, seed: int, validation: bool
) -> tuple[Data | None, list[Fault]]:
    """All rows of a recipe's data, and every fault of every file in one pass; None if any of them stops.

    validation: whether something will be chosen, so that a tenth of the training rows is needed where no file is named.
    """
    sources = [open_source(name, getattr(spec, name), spec.format) for name in SPLITS if getattr(spec, name)]
    name_apart(sources)
    for source in sources:
        read_rows(source, fields, spec.columns, spec.group if source.split == "train" else None)
        _settle_inner_splits(source, [other.split for other in sources])
    quarantined = _settle_bad_rows(sources, quarantine=spec.on_bad_row == "quarantine")
    label = next((name for name, f in fields.items() if f.kind == "label"), "")
    if label:
        quarantined += _check_labels(sources, label, quarantine=spec.on_bad_row == "quarantine")
    if faults := [fault for source in sources for fault in source.faults]:
        return None, faults
    keys = {r["row"]: inspection.content_key(r, fields) for source in sources for r in source.records}
    relations, notes = _look_across(sources, keys, label)
    seed = seed if spec.seed is None else spec.seed
    sets, held_out, faults = _assemble(sources, keys, spec, label, seed=seed, validation=validation)
    faults = faults or _limit(sets, sources[0], spec, label, held_out, seed)
    if faults:
        return None, faults
    labels = inspection.natural_labels(r[label] for r in sets["train"]) if label else ()
    counts = {name: Counter(r[label] for r in rows) for name, rows in sets.items() if label and rows}
    notes = [f"{source.name}: {note}" for source in sources for note in source.notes] + notes + held_out
    notes += inspection.label_notes({one: counts["train"][one] for one in labels}) if label else []
    facts = {
        "files": [file_facts(source) for source in sources],
        "labels": {name: {one: n[one] for one in labels} for name, n in counts.items()},
        **relations,
        "quarantined": quarantined,
        "split": {record["row"]: name for name, rows in sets.items() for record in rows},
        "columns": {source.split: source.columns for source in sources},
        "notes": notes,
    }
    return Data(sets["train"], sets["validation"], sets["test"], labels, notes, facts), []


def read_inputs(
    path: Path,
    fields: Mapping[str, Field],
    *,
    columns: Mapping[str, str],
    format: str | None = None,
    required: Sequence[str],
    answered: bool = True,
) -> tuple[list[Record], Table, list[Fault]]:
    """Rows to predict: only `required` fields are asked for, all other columns stay in "extra".

    answered: False where a field that holds question and answer may lack the answer.
    The table is what was read, so that it can be written again with columns added.
    """
    source = open_source("input", str(path), format)
    wanted = {name: f for name, f in fields.items() if name in required}
    if not answered:
        wanted = {name: replace(f, kind=inspection.UNANSWERED.get(f.kind, f.kind)) for name, f in wanted.items()}
    read_rows(source, wanted, {k: v for k, v in columns.items() if k in names(wanted)}, None)
    source.table.notes = source.notes
    return source.records, source.table, source.faults + [fault for found in source.bad.values() for fault in found]


# --------------------------------------------------------------------- checking
def _settle_bad_rows(sources: Sequence[Source], *, quarantine: bool) -> list[dict[str, str]]:
    """Bad rows become faults; in quarantine they are counted and listed, unless they are most of the file."""
    listed = []
    for source in sources:
        if quarantine and len(source.bad) * 2 <= source.num_read:
            listed += [_quarantined(source, row, faults[0]) for row, faults in source.bad.items()]
            continue
        if quarantine:
            got = f"{len(source.bad)} of {source.num_read}"
            source.faults.append(Fault("more than half of the rows cannot be used", source.name, got=got))
        source.faults += [f if quarantine else _with_way_out(f) for found in source.bad.values() for f in found]
    return listed


def _with_way_out(fault: Fault) -> Fault:
    return replace(fault, remedy=f"{fault.remedy} {QUARANTINE}".strip())


def _quarantined(source: Source, row: str, fault: Fault) -> dict[str, str]:
    reason = f"{fault.field}: {fault.problem}" if fault.field else fault.problem
    source.dropped[reason] += 1
    return {"row": row, "where": fault.where, "reason": reason}


def _settle_inner_splits(source: Source, given: Sequence[str]) -> None:
    """A folder with train/, val/ and test/ inside brings its own split; what the recipe names besides wins."""
    inner = {row.split for row in source.table.rows} - {""}
    if inner and source.split != "train":
        problem = "the folder is itself split into train/ and others"
        inside = source.path / "test" if source.path.is_dir() else f"{source.path}:test"
        remedy = f"Name the part of it that is meant: data.{source.split}={inside}"
        source.faults.append(Fault(problem, f"data.{source.split}", remedy=remedy))
    for other in sorted(inner & set(given) - {source.split}):
        rows = [record for record in source.records if source.splits[record["row"]] == other]
        source.drop(rows, f"data.{other} names another source")
        source.notes.append(f"its own {other} set ({len(rows)} rows) is not used: data.{other} names another")


def _rows(sources: Sequence[Source], name: str) -> list[Record]:
    return [record for source in sources for record in source.records if source.splits[record["row"]] == name]


def _check_labels(sources: Sequence[Source], label: str, *, quarantine: bool) -> list[dict[str, str]]:
    """Faults of the labels as a set; in quarantine, rows with a label unknown to training are listed and dropped."""
    train = sources[0]
    if label not in train.columns or train.table.faults or (train.table.broken and not quarantine):
        return []  # without all training rows nobody knows which labels there are
    rows = _rows(sources, "train")
    rows += [] if quarantine else [r for r in train.partial if label in r and train.splits[r["row"]] == "train"]
    names = [record[label] for record in rows]
    train.faults += inspection.label_faults(names, train.name, label)
    known, listed = inspection.natural_labels(names), []
    for source in sources:
        others = [record for record in source.records if source.splits[record["row"]] != "train"]
        for fault, wrong in inspection.unknown_labels(others, label, known) if known else ():
            if not quarantine:
                source.faults.append(_with_way_out(fault))
                continue
            reason = f"{label}: {fault.problem}"
            source.drop(wrong, reason)
            listed += [{"row": r["row"], "where": r["where"], "reason": reason} for r in wrong]
    return listed


def _look_across(sources: Sequence[Source], keys: Mapping[str, str], label: str) -> tuple[dict[str, Any], list[str]]:
    """Copies, contradictions, and training rows that stand in the other sets too, which are dropped."""
    sets = {name: _rows(sources, name) for name in SPLITS}
    notes, duplicates = [], {}
    for name, rows in sets.items():
        duplicates[name], example = inspection.copies(rows, keys)
        if example:
            notes.append(f"{name}: {duplicates[name]} rows are copies: {example}; copies stay on one side of a split")
    torn, example = inspection.conflicts([r for rows in sets.values() for r in rows], keys, label) if label else (0, "")
    if torn:
        notes.append(f"{torn} contents have more than one label; {example}")
    dropped = 0
    for name in ("test", "validation"):
        there = {keys[record["row"]] for record in sets[name]}
        for source in sources:
            twice = [r for r in source.records if source.splits[r["row"]] == "train" and keys[r["row"]] in there]
            if twice:
                source.drop(twice, f"also in the {name} set")
                notes.append(f"{source.name}: {len(twice)} training rows dropped: they also stand in the {name} set")
            dropped += len(twice)
    duplicates = {name: n for name, n in duplicates.items() if sets[name]}
    return {"duplicates": duplicates, "conflicts": torn, "overlap_dropped": dropped}, notes


# --------------------------------------------------------------------- splitting
def _assemble(
    sources: Sequence[Source], keys: Mapping[str, str], spec: DataSpec, label: str, *, seed: int, validation: bool
) -> tuple[dict[str, list[Record]], list[str], list[Fault]]:
    """The three sets, what was held out for them, and a fault for a set that came out empty."""
    sets = {name: _rows(sources, name) for name in SPLITS}
    faults = [_emptied(source) for source in sources if not sets[source.split]]
    if label and sets["train"]:  # what was dropped as overlap may have been all of a class
        known = inspection.natural_labels(record[label] for record in sets["train"])
        faults += [f for f, _ in inspection.unknown_labels(sets["validation"] + sets["test"], label, known)]
    if faults:
        return sets, [], faults
    groups = sources[0].groups
    notes = []
    for name, share in [("test", spec.holdout)] + ([("validation", VALIDATION)] if validation else []):
        if sets[name]:
            continue
        rows = sets["train"]
        sets["train"], sets[name] = split(
            rows,
            share,
            seed=seed,
            key=lambda record: keys[record["row"]],
            stratify=(lambda record: record[label]) if label else None,
            group=(lambda record: groups[record["row"]]) if spec.group else None,
        )
        notes.append(f"{name}: {len(sets[name])} of {len(rows)} training rows held out (share {share:g}, seed {seed})")
        faults += [] if sets[name] else [_no_holdout(name, len(rows), sources[0])]
    if loners := spec.group and sum(not value for value in groups.values()):
        notes.append(f'{loners} rows have no "{spec.group}": each stands alone')
    return sets, notes, faults


def _limit(
    sets: dict[str, list[Record]], train: Source, spec: DataSpec, label: str, notes: list[str], seed: int
) -> list[Fault]:
    """Keep `data.limit` of the training rows; the other sets stay as they are."""
    rows = sets["train"]
    if spec.limit is None:
        return []
    classes = len({record[label] for record in rows}) if label else 1
    if spec.limit < classes:
        expected = f"{classes} or more, one row for each label"
        return [Fault("too few rows to learn from", "data.limit", expected=expected, got=str(spec.limit))]
    sets["train"] = nested(
        rows, spec.limit, seed=seed, stratify=(lambda record: record[label]) if label else None,
        group=(lambda record: train.groups[record["row"]]) if spec.group else None,
    )  # fmt: skip
    notes.append(f"train: {len(sets['train'])} of {len(rows)} training rows used (data.limit, drawn by row id)")
    return []


def _emptied(source: Source) -> Fault:
    got = ", ".join(f"{count} dropped: {reason}" for reason, count in source.dropped.items())
    return Fault(f"no {source.split} rows are left", source.name, got=got or f"{source.num_read} rows")


def _no_holdout(name: str, num_rows: int, train: Source) -> Fault:
    return Fault(
        f"no {name} set can be held out of the training rows",
        train.name,
        expected="at least two rows of some class that are not copies or one group",
        got=f"{num_rows} row{'s' if num_rows > 1 else ''}",
        remedy=f"Add rows, or name a file: data.{name}=file",
    )
