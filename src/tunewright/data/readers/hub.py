"""Data sets of the Hugging Face hub, and folders that `datasets` wrote with save_to_disk. Knows no task.

An id is `org/name`, `org/name:split`, or with a configuration `org/name#config:split`; split as in `train[:100]`.
Needs the extra [hub]. The cache comes first; code that comes with a data set is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunewright.data.raw import RawRow, Table, plain, shown
from tunewright.errors import Fault, nearest

SUFFIXES = ()  # neither an id nor such a folder has one
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
HUB_SECONDS = 4.0  # a hub that has not answered by then is away; `datasets` alone tried for 23 s (measured)


def claims(path: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    names = ("dataset_info.json", "state.json")
    return (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in names)


def read(path: Path) -> Table:
    """All rows, and what was wrong. `path`: such a folder, or an id (paths keep "#" and ":" as they are)."""
    table = Table(root=path.parent)
    try:
        import datasets
    except ImportError:
        remedy = 'pip install "tunewright[hub]"'
        table.faults.append(Fault("reading data sets of the hub needs an extra", path.name, remedy=remedy))
        return table
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(path)) if path.is_dir() else _load(datasets, str(path), table)
    except Exception as error:  # a dozen kinds, of the hub's client, of pyarrow and of `datasets` itself
        first = str(error).strip().partition("\n")[0]
        table.faults.append(Fault(f"the data set cannot be read: {first[:300]}", str(path), remedy=_remedy(str(error))))
        return table
    if found is not None:
        name = path.name if path.is_dir() else str(path).partition(":")[0]
        _fill(table, name, found, _split_of(str(path)))
    if not path.is_dir():
        lines = (json.dumps(row.values, sort_keys=True, default=str) + "\n" for row in table.rows)
        table.sha256 = _digest(lines)
    return table


def _split_of(place: str) -> str:
    return place.partition(":")[2]


def _remedy(said: str) -> str:
    """What to do about the commoner ones of `datasets`' own words."""
    if "onfig name is missing" in said:
        return "Name one: org/name#config. " + " ".join(re.findall(r"\[.*?\]", said)[:1])
    if "script" in said.lower():
        return "It brings code, which is never run: convert it to Parquet and pass the file."
    return ""


# ------------------------------------------------------------------------ finding
def _load(datasets: Any, place: str, table: Table) -> Any:
    """The data set of an id: from the cache, else from the hub if it answers in time; None with a fault if neither."""
    name, _, split = place.partition(":")
    repository, _, config = name.partition("#")

    def load() -> Any:
        return datasets.load_dataset(repository, config or None, split=split or None)

    with _offline(datasets), contextlib.suppress(ConnectionError, FileNotFoundError):
        found = load()
        table.notes.append("read from the cache of `datasets`, without asking the hub")
        return found
    if problem := _hub_problem(repository):
        table.faults.append(_away(place, str(datasets.config.HF_DATASETS_CACHE), problem))
        return None
    return load()


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_problem(repository: str) -> str:
    """Why the hub cannot help; "" if it knows the data set. Answers within HUB_SECONDS."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    answer: list[Any] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            answer.append(HfApi().dataset_info(repository, timeout=HUB_SECONDS))
        except Exception as error:  # whatever the hub's client raises becomes one of the sentences below
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answer:
        return f"the hub did not answer within {HUB_SECONDS:.0f} seconds"
    kind = type(answer[0]).__name__
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return f"the hub says {kind} (a misspelt id, or a private one that needs `hf auth login`)"
    return f"the hub cannot be reached ({kind})" if isinstance(answer[0], Exception) else ""


def _away(place: str, cache: str, why: str) -> Fault:
    return Fault(
        f"not found: no such file or folder here, not in the cache ({cache}), and {why}",
        where=f'data set "{place}"',
        remedy="Copy the data to this machine and pass its file or folder: data.train=/path/to/rows.parquet.",
    )


# ------------------------------------------------------------------------ rows
def _fill(table: Table, name: str, found: Any, split: str) -> None:
    """Rows of one split, or of all that a data set brings with their place in train, validation and test."""
    if not isinstance(found, Mapping):
        _add(table, f"{name}:{split}" if split else name, found, "")
        return
    if len(found) == 1:
        only, rows = next(iter(found.items()))
        _add(table, f"{name}:{only}", rows, "")
        return
    used = {key: SPLITS[key] for key in found if key in SPLITS}
    if "train" not in used:
        remedy = f"{nearest('train', list(found))} Name one: {name}:{next(iter(found))}".strip()
        table.faults.append(Fault("none of its splits is called train", name, got=shown(list(found)), remedy=remedy))
        return
    table.notes.append("it is already split: " + ", ".join(f"{key} is the {kind} set" for key, kind in used.items()))
    if beside := [key for key in found if key not in used]:
        table.notes.append(f"splits that are not used: {shown(beside)}")
    for key, kind in used.items():
        _add(table, f"{name}:{key}", found[key], kind)


def _add(table: Table, name: str, rows: Iterable[dict[str, Any]], split: str) -> None:
    """Rows as they come: nothing is asked for but an iterator, so that a streamed data set will do."""
    features = getattr(rows, "features", None) or {}
    media = [key for key, feature in features.items() if hasattr(feature, "decode_example")]
    media = [key for key in media if not hasattr(features[key], "names")]
    if media:
        rows = rows.remove_columns(media)  # type: ignore[attr-defined]
        problem = f"the columns {shown(media)} hold pictures or sound inside the data set, which is not read yet"
        table.doubt = Fault(problem, name, remedy="Save them as files and pass the folder.")
        table.notes.append(problem)
    classes = {key: feature.names for key, feature in features.items() if hasattr(feature, "names")}
    columns = dict.fromkeys(key for key in features if key not in media)
    for number, values in enumerate(rows, 1):
        columns |= dict.fromkeys(values)  # a stream may not say beforehand what it has
        named = {key: _class_name(value, classes.get(key)) for key, value in values.items()}
        row, where = f"{name}:{number}", f"{name} row {number}"
        try:
            table.rows.append(RawRow(row, where, {key: plain(value) for key, value in named.items()}, split))
        except UnicodeDecodeError:
            table.broken[row] = Fault("a value is bytes and no UTF-8 text", where, expected="a text")
    table.columns += tuple(column for column in columns if column not in table.columns)


def _class_name(value: Any, names: list[str] | None) -> Any:
    """Labels stored as numbers get their names back; -1 is how an unlabelled test set says null."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
