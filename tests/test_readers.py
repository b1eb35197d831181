"""Parquet files, hub ids and folders of `datasets`: the rows that went in, and clear words where there are none."""

from __future__ import annotations

import datetime
import json
import time
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tunewright.contracts import Field
from tunewright.data import records, sources
from tunewright.data.readers import hub
from tunewright.data.readers import parquet as parquet_reader
from tunewright.recipe import DataSpec, Recipe

TEXT = {"text": Field("the text", "text", ("sentence",)), "label": Field("the class", "label", ("target",))}
ROWS = [{"text": f"sentence number {n}", "label": "ab"[n % 2], "customer": f"c{n // 4}"} for n in range(40)]
BAD = [*ROWS, {"text": None, "label": "a", "customer": "x"}, {"text": "  ", "label": "b", "customer": "x"}]


def write_parquet(path: Path, rows: list[dict]) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_saved(path: Path, rows: list[dict]) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


WRITERS = {"rows.parquet": write_parquet, "saved": write_saved}


def load(place: str, **options):
    return records.load(DataSpec(place, **options), TEXT, seed=0, validation=False)


def words(faults) -> str:
    return "\n".join(map(str, faults))


@pytest.mark.parametrize("name", WRITERS)
def test_typed_files_give_the_rows_that_went_in(tmp_path, name):
    data, faults = load(WRITERS[name](tmp_path / name, ROWS))
    assert not faults
    found = sorted(data.train + data.test, key=lambda r: int(r["row"].rpartition(":")[2]))
    assert [(r["text"], r["label"]) for r in found] == [(r["text"], r["label"]) for r in ROWS]
    assert (found[0]["row"], found[0]["where"]) == (f"{name}:1", f"{name} row 1")
    assert found[0]["extra"] == {"customer": "c0"}
    assert data.facts["files"][0]["format"] == {"rows.parquet": "parquet", "saved": "hub"}[name]
    assert len(data.facts["files"][0]["sha256"]) == 64


@pytest.mark.parametrize("name", WRITERS)
def test_bad_rows_are_named_by_number_or_set_aside(tmp_path, name):
    place = WRITERS[name](tmp_path / name, BAD)
    data, faults = load(place)
    assert data is None
    assert f"{name} row 41" in words(faults)
    assert f"{name} row 42" in words(faults)
    data, faults = load(place, on_bad_row="quarantine")
    assert not faults
    assert [q["row"] for q in data.facts["quarantined"]] == [f"{name}:41", f"{name}:42"]
    assert len(data.train) + len(data.test) == len(ROWS)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_a_group_stay_on_one_side(tmp_path, name):
    data, faults = load(WRITERS[name](tmp_path / name, ROWS), group="customer", holdout=0.3)
    assert not faults
    sides = [{r["extra"]["customer"] for r in rows} for rows in (data.train, data.test)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_parquet_values_keep_their_kind(tmp_path):
    day = datetime.date(2026, 11, 21)
    row = {
        "text": "007",
        "n": 7,
        "x": 0.5,
        "none": None,
        "yes": True,
        "day": day,
        "price": Decimal("1.50"),
        "raw": b"ok",
    }
    table = parquet_reader.read(Path(write_parquet(tmp_path / "d.parquet", [row, row | {"none": "s"}])))
    assert table.rows[0].values == row | {"day": "2026-11-21", "price": "1.50", "raw": "ok"}
    assert json.dumps(table.rows[0].values)


def test_bytes_that_are_no_text_break_their_row_alone(tmp_path):
    table = parquet_reader.read(Path(write_parquet(tmp_path / "d.parquet", [{"a": b"ok"}, {"a": b"\xff\xfe"}])))
    assert len(table.rows) == 1
    assert "UTF-8" in str(table.broken["d.parquet:2"])


DAMAGE = {
    "empty (0 bytes)": lambda p: p.write_bytes(b""),
    "no Parquet file": lambda p: p.write_text("text,label\na,b\n"),
    "damaged": lambda p: p.write_bytes(p.read_bytes()[:-40]),
    "no rows": lambda p: parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), p),
    "two columns": lambda p: parquet.write_table(pyarrow.table([[1], [2]], names=["text", "text"]), p),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_parquet_file_that_cannot_be_read_says_why(tmp_path, said):
    path = Path(write_parquet(tmp_path / "d.parquet", ROWS))
    DAMAGE[said](path)
    data, faults = load(str(path))
    assert data is None
    assert said in words(faults)
    assert "d.parquet" in words(faults)


# -------------------------------------------------------------------------- hub
@pytest.fixture
def saved_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )

    def part(start, n, label=None):
        rows = {"text": [f"sentence {i}" for i in range(start, start + n)]}
        rows["label"] = [label if label is not None else i % 2 for i in range(n)]
        return datasets.Dataset.from_dict(rows, features=features)

    parts = {"train": part(0, 30), "validation": part(30, 6), "test": part(36, 8), "unsupervised": part(44, 4, -1)}
    return datasets.DatasetDict(parts)


def test_a_data_set_brings_its_splits_and_label_names(tmp_path, saved_splits):
    saved_splits.save_to_disk(str(tmp_path / "saved"))
    data, faults = load(str(tmp_path / "saved"))
    assert not faults
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 6, 8)
    assert data.labels == ("bad", "good")
    assert data.train[0]["row"] == "saved:train:1"
    assert any("unsupervised" in note for note in data.notes)


def test_an_unlabelled_row_is_a_null(tmp_path, saved_splits):
    saved_splits["unsupervised"].save_to_disk(str(tmp_path / "saved"))
    _, faults = load(str(tmp_path / "saved"))
    assert "null" in words(faults)


def test_an_id_is_looked_for_in_the_cache_and_its_parts_are_understood(monkeypatch, saved_splits):
    import datasets

    asked = []

    def load_dataset(name, config=None, split=None):
        assert datasets.config.HF_HUB_OFFLINE is True
        asked.append((name, config, split))
        return saved_splits[split] if split else saved_splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for place in ("org/name", "org/name:train", "org/name#config:train"):
        data, faults = load(place)
        assert not faults
        assert len(data.train) + len(data.test) > 25
    assert asked == [("org/name", None, None), ("org/name", None, "train"), ("org/name", "config", "train")]
    assert data.facts["files"][0]["sha256"] != load("org/name:test")[0].facts["files"][0]["sha256"]
    data, faults = load("org/name:train", test="org/name:test")
    assert not faults
    assert (len(data.train), len(data.test)) == (30, 8)


@pytest.mark.parametrize("offline", ["1", ""])
def test_an_id_without_a_network_fails_within_five_seconds_and_says_what_to_do(monkeypatch, offline):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: time.sleep(60))
    assert hub.HUB_SECONDS <= 4
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.3)
    began = time.perf_counter()
    data, faults = load("org/no-such-data")
    assert time.perf_counter() - began < 1.3
    assert data is None
    for part in ("org/no-such-data", "cache (", "data.train=/path", "HF_HUB_OFFLINE" if offline else "did not answer"):
        assert part in words(faults)


def test_a_missing_file_is_not_taken_for_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for place in ("rows.csv", "org/rows.csv", "data/rows", "/a/b", "../x"):
        assert "no such file" in words(load(place)[1]), place
    assert not sources._is_hub_id(Path("name-alone"))
    assert sources._is_hub_id(Path("org/name"))


def test_a_path_that_exists_wins_over_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write_parquet(tmp_path / "org" / "name", ROWS)
    data, _ = load("org/name", format="parquet")
    assert len(data.train) + len(data.test) == 40


def test_a_recipe_leaves_an_id_as_it_is(tmp_path):
    tree = {"model": "m/x", "task": "text-classification", "data": "org/name#c:train", "method": "head"}
    assert Recipe.of(tree, folder=tmp_path)[0].data.train == "org/name#c:train"


def test_without_the_extra_the_error_names_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "tunewright[hub]" in words(hub.read(Path("org/name")).faults)


def test_pictures_inside_a_data_set_are_left_out_and_said(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    rows = {"image": [Image.new("RGB", (8, 8))] * 4, "label": ["a", "b", "a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    table = hub.read(tmp_path / "saved")
    assert table.columns == ("label",)
    assert "Save them as files" in str(table.doubt)


def test_a_stream_will_do(tmp_path):
    rows = ({"text": f"sentence {n}", "label": "ab"[n % 2]} for n in range(3))
    table = hub.Table(root=tmp_path)
    hub._add(table, "org/name:train", rows, "")
    assert table.columns == ("text", "label")
    assert [row.row for row in table.rows] == ["org/name:train:1", "org/name:train:2", "org/name:train:3"]
