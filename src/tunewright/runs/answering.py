"""The `predict` verb: whatever a person hands over (a text, a picture, a folder, a file of rows) gets answers.

Knows run folders, files and the readers; not what a task predicts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright.contracts import Record, Task
from tunewright.data import records
from tunewright.errors import DataError, Fault
from tunewright.runs.prediction import Predictor, as_output, open_run, single_record

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a cell that begins so


def answer(
    folder: Path, given: str, base: str | None = None, output: str | None = None
) -> tuple[list[dict[str, Any]], Path | None]:
    """Answers to the input, and the file they were written to, if it was a file of rows or `output` was given.

    Raises DataError before the model is opened if the input cannot be used.
    """
    predictor = open_run(folder, base)
    path = Path(given)
    is_table = path.suffix.lower() in TABLES
    if is_table and not path.is_file():
        raise DataError(Fault("no such file", where=given))
    if is_table:
        rows = _table_rows(predictor, path)
    elif path.is_dir():
        rows = _folder_rows(predictor.task, path)
    else:
        rows = [single_record(predictor.task, given)]
    answers = as_output(rows, predictor(rows))
    if output is None and path.suffix.lower() not in (".csv", ".tsv"):
        return answers, None
    target = Path(output) if output else path.with_suffix(f".predicted{path.suffix}")
    _write(target, path if is_table else None, rows, answers)
    return answers, target


def _table_rows(predictor: Predictor, path: Path) -> list[Record]:
    inputs = [name for name, field in predictor.task.fields.items() if field.kind != "label"]
    columns = predictor.recipe.data.columns
    rows, table, faults = records.read_inputs(
        path, predictor.task.fields, columns=columns, required=inputs, answered=False
    )
    if faults:
        raise DataError(faults)
    return [row | {"columns": raw.values} for row, raw in zip(rows, table.rows, strict=True)]


def _folder_rows(task: Task, folder: Path) -> list[Record]:
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    if not pictures:
        raise DataError(Fault("no pictures in this folder", where=str(folder), expected="files such as photo.jpg"))
    return [single_record(task, str(p)) | {"row": str(p.relative_to(folder))} for p in pictures]


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
        writer = csv.DictWriter(file, list(lines[0]), delimiter="\t" if target.suffix.lower() == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({k: _cell(v) if k.startswith("predicted_") else v for k, v in line.items()} for line in lines)


def _cell(value: Any) -> Any:
    """A label is somebody's text: made harmless for spreadsheets."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
