"""A person's files as rows of the task: read, mapped, checked, split, with every fault and every guess named.

Knows the recipe's data section and the task's fields, never a task. Readers are found by file name in data/readers;
the whole account of what came in and what did not goes to the run's data.json.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunewright.data import inspection
from tunewright.data.columns import names
from tunewright.data.raw import Table
from tunewright.data.rows import Rows, chosen, plain
from tunewright.data.sources import SPLITS, Pool, Source, file_facts, label_field, name_apart, open_source, read_rows
from tunewright.data.split import drawn, held_out
from tunewright.errors import Fault

if TYPE_CHECKING:
    from tunewright.contracts import Field, Record
    from tunewright.recipe import DataSpec

VALIDATION = 0.1  # of the training rows, where one must choose and no file is named
QUARANTINE = "Mend it, or leave such rows out: data.on_bad_row=quarantine"


@dataclass
class Data:
    """The rows of one run. `facts` is JSON-ready: what data.json holds."""

    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
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
    pool = Pool()
    sources = [open_source(name, getattr(spec, name), spec.format, pool) for name in SPLITS if getattr(spec, name)]
    name_apart(sources)
    for source in sources:
        read_rows(source, fields, spec.columns, spec.group if source.split == "train" else None)
        _settle_inner_splits(source, [other.split for other in sources])
    quarantined = _settle_bad_rows(sources, quarantine=spec.on_bad_row == "quarantine")
    label = label_field(fields)
    if label:
        quarantined += _check_labels(sources, label, quarantine=spec.on_bad_row == "quarantine")
    if faults := [fault for source in sources for fault in source.faults]:
        return None, faults
    contents = inspection.same_contents(pool.rows, fields)
    relations, notes = _look_across(sources, contents, label)
    seed = seed if spec.seed is None else spec.seed
    sets, held, faults = _assemble(sources, contents, spec, label, seed=seed, validation=validation)
    faults = faults or _limit(sets, pool, spec, label, held, seed)
    if faults:
        return None, faults
    labels = inspection.natural_labels(_labels(pool, sets["train"])) if label else ()
    counts = {name: Counter(_labels(pool, places)) for name, places in sets.items() if label and len(places)}
    notes = [f"{source.name}: {note}" for source in sources for note in source.notes] + notes + held
    notes += inspection.label_notes({one: counts["train"][one] for one in labels}) if label else []
    records = {name: plain(chosen(pool.rows, places)) for name, places in sets.items()}
    notes += _where_rows_are(pool.rows)
    facts = {
        "files": [file_facts(source) for source in sources],
        "labels": {name: {one: n[one] for one in labels} for name, n in counts.items()},
        **relations,
        "quarantined": quarantined,
        "split": SplitOf(records) if pool.rows.store.in_file else dict(_sides(records)),
        "columns": {source.split: source.columns for source in sources},
        "notes": notes,
    }
    return Data(records["train"], records["validation"], records["test"], labels, notes, facts), []


class SplitOf(dict[str, str]):
    """Row id -> its set, for all rows, read off them whenever somebody goes through it or asks.

    A dict by descent because json writes no other mapping.
    """

    def __init__(self, sets: Mapping[str, Sequence[Record]]) -> None:
        super().__init__({"": ""})  # json's encoder in C takes an own size of 0 for an empty dict
        self._sets, self._more = sets, dict[str, str]()

    def items(self) -> Iterator[tuple[str, str]]:  # type: ignore[override]
        return itertools.chain(_sides(self._sets), self._more.items())

    def whole(self) -> dict[str, str]:
        return dict(self.items())

    def keys(self) -> Iterator[str]:  # type: ignore[override]
        return (row for row, _ in self.items())

    __iter__ = keys

    def values(self) -> Iterator[str]:  # type: ignore[override]
        return (name for _, name in self.items())

    def __len__(self) -> int:
        return sum(map(len, self._sets.values())) + len(self._more)

    def __getitem__(self, row: str) -> str:
        return self.whole()[row]

    def __contains__(self, row: object) -> bool:
        return any(row == one for one in self)

    def __eq__(self, other: object) -> bool:
        return self.whole() == other

    def __or__(self, more: dict[str, str]) -> dict[str, str]:  # type: ignore[override]
        return self.whole() | more

    def __ior__(self, more: dict[str, str]) -> SplitOf:  # type: ignore[override,misc]
        self._more |= more
        return self


def _sides(sets: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, str]]:
    return ((record["row"], name) for name, rows in sets.items() for record in rows)


def _where_rows_are(rows: Rows) -> list[str]:
    """A sentence where there are so many rows that they do not simply stand in memory."""
    if rows.store.in_file:
        return [f"{len(rows)} rows are kept in a temporary file, not in memory, and read from it when needed"]
    return [f"all {len(rows)} rows are kept in memory: {rows.store.why}"] if rows.store.why else []


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
    faults = source.faults + [fault for found in source.bad.values() for fault in found]
    return list(source.records), source.table, faults


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
    inner = source.inner
    if inner and source.split != "train":
        problem = "the folder is itself split into train/ and others"
        inside = source.path / "test" if source.path.is_dir() else f"{source.path}:test"
        remedy = f"Name the part of it that is meant: data.{source.split}={inside}"
        source.faults.append(Fault(problem, f"data.{source.split}", remedy=remedy))
    for other in sorted(inner & set(given) - {source.split}):
        rows = source.pool.of(source.places, other)
        source.drop(rows, f"data.{other} names another source")
        source.notes.append(f"its own {other} set ({len(rows)} rows) is not used: data.{other} names another")


def _places(sources: Sequence[Source], name: str) -> np.ndarray:
    return np.concatenate([source.pool.of(source.places, name) for source in sources])


def _labels(pool: Pool, places: np.ndarray) -> list[str]:
    return [pool.labels[place] for place in places]


def _groups(pool: Pool, places: np.ndarray) -> list[str]:
    return [pool.groups[place] for place in places]


def _strangers(pool: Pool, places: np.ndarray, known: Sequence[str]) -> np.ndarray:
    """Those of the places whose label is unknown."""
    names = set(known)
    return np.array([place for place in places.tolist() if pool.labels[place] not in names], dtype=np.int64)


def _check_labels(sources: Sequence[Source], label: str, *, quarantine: bool) -> list[dict[str, str]]:
    """Faults of the labels as a set; in quarantine, rows with a label unknown to training are listed and dropped."""
    train = sources[0]
    if label not in train.columns or train.table.faults or (train.table.broken and not quarantine):
        return []  # without all training rows nobody knows which labels there are
    pool = train.pool
    names = _labels(pool, _places(sources, "train"))
    names += [] if quarantine else [r[label] for split_name, r in train.partial if label in r and split_name == "train"]
    train.faults += inspection.label_faults(names, train.name, label)
    known, listed = inspection.natural_labels(names), []
    for source in sources:
        strange = _strangers(pool, np.setdiff1d(source.places, pool.of(source.places, "train")), known)
        for fault, wrong in inspection.unknown_labels(chosen(pool.rows, strange), label, known) if known else ():
            if not quarantine:
                source.faults.append(_with_way_out(fault))
                continue
            reason = f"{label}: {fault.problem}"
            source.drop(strange[[pool.labels[place] == wrong[0][label] for place in strange]], reason)
            listed += [{"row": r["row"], "where": r["where"], "reason": reason} for r in wrong]
    return listed


def _look_across(sources: Sequence[Source], contents: np.ndarray, label: str) -> tuple[dict[str, Any], list[str]]:
    """Copies, contradictions, and training rows that stand in the other sets too, which are dropped."""
    pool, sets = sources[0].pool, {name: _places(sources, name) for name in SPLITS}
    notes, duplicates = [], {}
    for name, places in sets.items():
        duplicates[name], example = inspection.copies(places, contents, pool.rows)
        if example:
            notes.append(f"{name}: {duplicates[name]} rows are copies: {example}; copies stay on one side of a split")
    everywhere = np.concatenate(list(sets.values()))
    torn, example = inspection.conflicts(everywhere, contents, pool.labels, pool.rows) if label else (0, "")
    if torn:
        notes.append(f"{torn} contents have more than one label; {example}")
    dropped = 0
    for name in ("test", "validation"):
        for source in sources:
            own = pool.of(source.places, "train")
            twice = own[np.isin(contents[own], contents[sets[name]])]
            if len(twice):
                source.drop(twice, f"also in the {name} set")
                notes.append(f"{source.name}: {len(twice)} training rows dropped: they also stand in the {name} set")
            dropped += len(twice)
    duplicates = {name: n for name, n in duplicates.items() if len(sets[name])}
    return {"duplicates": duplicates, "conflicts": torn, "overlap_dropped": dropped}, notes


# --------------------------------------------------------------------- splitting
def _assemble(
    sources: Sequence[Source], contents: np.ndarray, spec: DataSpec, label: str, *, seed: int, validation: bool
) -> tuple[dict[str, np.ndarray], list[str], list[Fault]]:
    """The places of the three sets, what was held out for them, and a fault for a set that came out empty."""
    pool, sets = sources[0].pool, {name: _places(sources, name) for name in SPLITS}
    faults = [_emptied(source) for source in sources if not len(sets[source.split])]
    if label and len(sets["train"]):  # what was dropped as overlap may have been all of a class
        known = inspection.natural_labels(_labels(pool, sets["train"]))
        strange = _strangers(pool, np.concatenate([sets["validation"], sets["test"]]), known)
        faults += [f for f, _ in inspection.unknown_labels(chosen(pool.rows, strange), label, known)]
    if faults:
        return sets, [], faults
    notes = []
    for name, share in [("test", spec.holdout)] + ([("validation", VALIDATION)] if validation else []):
        if len(sets[name]):
            continue
        rows = sets["train"]
        apart = held_out(
            (r["row"] for r in chosen(pool.rows, rows)), contents[rows], share, seed=seed,
            classes=_labels(pool, rows) if label else None, groups=_groups(pool, rows) if spec.group else None,
        )  # fmt: skip
        sets["train"], sets[name] = rows[~apart], rows[apart]
        notes.append(f"{name}: {len(sets[name])} of {len(rows)} training rows held out (share {share:g}, seed {seed})")
        faults += [] if len(sets[name]) else [_no_holdout(name, len(rows), sources[0])]
    if loners := spec.group and sources[0].loners:
        notes.append(f'{loners} rows have no "{spec.group}": each stands alone')
    return sets, notes, faults


def _limit(
    sets: dict[str, np.ndarray], pool: Pool, spec: DataSpec, label: str, notes: list[str], seed: int
) -> list[Fault]:
    """Keep `data.limit` of the training rows; the other sets stay as they are."""
    rows = sets["train"]
    if spec.limit is None:
        return []
    classes = len(set(_labels(pool, rows))) if label else 1
    if spec.limit < classes:
        expected = f"{classes} or more, one row for each label"
        return [Fault("too few rows to learn from", "data.limit", expected=expected, got=str(spec.limit))]
    taken = drawn(
        [r["row"] for r in chosen(pool.rows, rows)], spec.limit, seed=seed,
        classes=_labels(pool, rows) if label else None, groups=_groups(pool, rows) if spec.group else None,
    )  # fmt: skip
    sets["train"] = rows[taken]
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
