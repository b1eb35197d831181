"""The `predict` verb: whatever a person hands over (a text, a picture, a folder, a file of rows) gets answers.

Knows run folders, files and the readers; not what a task predicts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunewright.contracts import Record, Task
from tunewright.data import records
from tunewright.errors import DataError, Fault, nearest
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir
from tunewright.runs.prediction import as_output, input_field, open_run, single_record, task_of

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a cell that begins so


def answer(
    folder: Path,
    given: str,
    base: str | None = None,
    output: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], Path | None]:
    """Answers to the input, and the file they were written to, if it was a file of rows or `output` was given.

    say: told what was guessed or skipped while reading.
    Raises DataError before the model is opened if the input cannot be used.
    """
    recipe = RunDir.open(folder).recipe()
    path = Path(given)
    is_table = path.suffix.lower() in TABLES
    rows = _table_rows(recipe, path, say) if is_table else _other_rows(task_of(recipe), given)
    target = Path(output) if output else None
    if target is None and path.suffix.lower() in (".csv", ".tsv"):
        target = path.with_suffix(f".predicted{path.suffix}")
    if target is not None and not target.parent.is_dir():
        raise DataError(Fault("no such folder to write the answers to", where=str(target.parent)))
    answers = as_output(rows, open_run(folder, base)(rows))
    if target is not None:
        _write(target, path if is_table else None, rows, answers)
    return answers, target


def _table_rows(recipe: Recipe, path: Path, say: Callable[[str], None]) -> list[Record]:
    task = task_of(recipe)
    inputs = [name for name, field in task.fields.items() if field.kind != "label"]
    if not _lies_there(str(path)):
        here = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise DataError(Fault("no such file", where=str(path), remedy=nearest(path.name, here)))
    rows, table, faults = records.read_inputs(
        path, task.fields, columns=recipe.data.columns, required=inputs, answered=False
    )
    if faults:
        raise DataError(faults)
    for note in table.notes:
        say(f"{path.name}: {note}")
    return [row | {"columns": raw.values} for row, raw in zip(rows, table.rows, strict=True)]


def _other_rows(task: Task, given: str) -> list[Record]:
    """A text, a picture, or a folder of pictures."""
    wants_pictures = input_field(task)[1].kind == "image"
    if wants_pictures and _lies_there(given) and Path(given).is_dir():
        return _folder_rows(task, Path(given))
    if not wants_pictures and _lies_there(given):
        problem = "this run answers texts, and this is a path"
        remedy = "Put the rows in a CSV or JSONL file, or give the text itself."
        raise DataError(Fault(problem, where=given, expected="a text, or a file of rows", remedy=remedy))
    return [single_record(task, given)]


def _lies_there(given: str) -> bool:
    try:
        return bool(given.strip()) and Path(given).exists()
    except OSError:  # a text can be longer than any path
        return False


def _folder_rows(task: Task, folder: Path) -> list[Record]:
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and not p.name.startswith("."))
    if not pictures:
        raise DataError(Fault("no pictures in this folder", where=str(folder), expected="files such as photo.jpg"))
    rows: list[Record] = []
    faults: list[Fault] = []
    for picture in pictures:
        try:
            rows.append(single_record(task, str(picture)) | {"row": str(picture.relative_to(folder))})
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(faults)
    return rows


def _write(target: Path, source: Path | None, rows: Sequence[Record], answers: Sequence[dict[str, Any]]) -> None:
    """The user's own columns as they were, and `predicted_...` columns added; one JSON object a line for .jsonl."""
    lines = []
    for row, found in zip(rows, answers, strict=True):
        own = row["columns"] if source else {"row": found["row"]}
        lines.append(own | {f"predicted_{k}": v for k, v in found.items() if k not in ("row", "scores")})
    if target.suffix.lower() == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(lines), target)
        return
    with target.open("w", encoding="utf-8", newline="") as file:
        if target.suffix.lower() in (".jsonl", ".ndjson", ".json"):
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            return
        columns = dict.fromkeys(key for line in lines for key in line)  # rows of a .jsonl need not have the same keys
        writer = csv.DictWriter(file, list(columns), delimiter="\t" if target.suffix.lower() == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({k: _cell(v) if k.startswith("predicted_") else v for k, v in line.items()} for line in lines)


def _cell(value: Any) -> Any:
    """A label is somebody's text: made harmless for spreadsheets."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
