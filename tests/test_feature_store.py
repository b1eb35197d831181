"""Activations shared between runs: the same bytes warm, cold or gone; damage and a full disk cost nothing else."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import write_text_rows
from safetensors.torch import load_file
from test_trunk_cache import CELLS, OPTIONS, Stops

from tunewright.engine import cache_folder
from tunewright.engine.feature_store import FeatureStore
from tunewright.engine.row_groups import Groups, content_key, padded
from tunewright.engine.trunk import Trunk
from tunewright.runs import checking
from tunewright.runs.training import train

QUIET = {"quiet": True, "say": lambda text: None}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def shared(monkeypatch, tmp_path):
    """A store of one's own, empty."""
    monkeypatch.delenv("TUNEWRIGHT_CACHE")
    monkeypatch.setenv("TUNEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_folder, "MARGIN", 0)
    return tmp_path / "cache" / "activations"


def some(count=5, width=3, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {bytes([i]) * 32: torch.randn(i + 1, width, generator=rng).to(dtype) for i in range(count)}


def store_of(path):
    path.mkdir(parents=True, exist_ok=True)
    return FeatureStore(path)


# ----------------------------------------------------------------------- the store
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_again_bit_by_bit(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(cache_folder, "MARGIN", 0)
    tensors = some(dtype=dtype)
    given = store_of(tmp_path / "s").write("space", tensors, {"model": "m"})
    found = FeatureStore(tmp_path / "s").read("space", tensors.keys() | {b"x" * 32})
    assert found.keys() == given.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor)
        assert torch.equal(given[key], tensor)
    assert FeatureStore(tmp_path / "s").read("another", tensors.keys()) == {}


def test_only_the_owner_may_read_it(shared):
    folder, why = cache_folder.folder()
    assert (folder, why) == (shared, "")
    FeatureStore(folder).write("space", some(), {})
    files = [p for p in shared.rglob("*") if p.is_file()]
    assert len(files) == 3
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in files)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o700 for p in (shared, shared / "space"))
    shared.chmod(0o755)
    cache_folder.folder()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700


@pytest.mark.parametrize("harm", ["byte", "cut", "index", "record", "no rows"])
def test_damage_is_found_thrown_away_and_said(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(cache_folder, "MARGIN", 0)
    store = store_of(tmp_path / "s")
    store.write("space", some(), {})
    (index,) = (tmp_path / "s").glob("*/*.index")
    rows = index.with_suffix(".rows")
    data = bytearray(rows.read_bytes())
    if harm == "byte":
        data[7] ^= 1
        rows.write_bytes(data)
    elif harm == "cut":
        rows.write_bytes(data[:-4])
    elif harm == "index":
        index.write_bytes(b"\x00\xff nonsense")
    elif harm == "record":
        held = bytearray(index.read_bytes())
        held[-60] ^= 1
        index.write_bytes(held)
    else:
        rows.unlink()
    again = FeatureStore(tmp_path / "s")
    assert again.read("space", some().keys()) == {}
    assert bool(again.said) == (harm != "no rows"), "rows that are gone were taken by a neighbour who made room"
    again.write("space", some(), {})
    assert len(FeatureStore(tmp_path / "s").read("space", some().keys())) == 5


def test_the_oldest_leaves_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_folder, "MARGIN", 0)
    store = store_of(tmp_path / "s")
    for number, space in enumerate("abc"):
        store.write(space, some(seed=number), {})
        (index,) = (tmp_path / "s" / space).glob("*.index")
        os.utime(index, (number + 1, number + 1))
    store.read("a", some().keys())  # used just now
    one = cache_folder.segments(tmp_path / "s")[0].size
    monkeypatch.setattr(cache_folder, "LIMIT", 3 * one)
    store.write("d", some(seed=4), {})
    left = {segment.index.parent.name for segment in cache_folder.segments(tmp_path / "s")}
    assert left == {"a", "c", "d"}
    monkeypatch.setattr(cache_folder, "LIMIT", 10)
    kept = store.write("e", some(), {})
    assert len(kept) == 5, "what the disk does not take stays in memory"
    assert "not shared" in store.said[-1]


def test_what_a_killed_writer_left_is_swept(tmp_path):
    space = tmp_path / "s" / "space"
    space.mkdir(parents=True)
    for name in ("old.rows", "old.index-1.partial", "new.rows"):
        (space / name).write_bytes(b"half")
    for name in ("old.rows", "old.index-1.partial"):
        os.utime(space / name, (1, 1))
    cache_folder.make_room(tmp_path / "s", 1)
    assert [p.name for p in space.iterdir()] == ["new.rows"], "another process may still be writing"


def test_where_there_is_no_folder_the_reason_is_said(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for environ, said in (
        ({"TUNEWRIGHT_CACHE": "off"}, "switches it off"),
        ({"TUNEWRIGHT_CACHE_DIR": str(blocked)}, "Not a directory"),
        ({"XDG_CACHE_HOME": str(blocked)}, "Not a directory"),
    ):
        folder, why = cache_folder.folder(environ)
        assert folder is None
        assert said in why
    assert cache_folder.place({"XDG_CACHE_HOME": "/x"}).as_posix() == "/x/tunewright/activations"


WRITER = """
import sys, torch
from pathlib import Path
from tunewright.engine import cache_folder
from tunewright.engine.feature_store import FeatureStore
cache_folder.MARGIN = 0
cache_folder.LIMIT = 40_000
store = FeatureStore(Path(sys.argv[1]))
for turn in range(25):
    tensors = {bytes([i, turn]) * 16: torch.full((20, 4), 100.0 * turn + i) for i in range(10)}
    store.write("space", tensors, {})
    found = store.read("space", tensors.keys())
    for key, value in found.items():
        assert torch.equal(value, tensors[key])
assert not store.said, store.said
"""


def test_two_processes_share_it_while_room_is_made(tmp_path):
    (tmp_path / "s").mkdir()
    words = [sys.executable, "-c", WRITER, str(tmp_path / "s")]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    total = sum(segment.size for segment in cache_folder.segments(tmp_path / "s"))
    assert 0 < total <= 2 * 40_000


# ------------------------------------------------------------------ rows and groups
def test_a_row_is_known_by_its_tensors_alone():
    one = {"row": "a", "input_ids": torch.tensor([1, 2]), "length": 2, "label": 0}
    assert content_key(one) == content_key(one | {"row": "b", "label": 1})
    assert content_key(one) != content_key(one | {"input_ids": torch.tensor([1, 3])})
    assert content_key(one) != content_key(one | {"input_ids": torch.tensor([[1], [2]])})
    assert content_key(one) != content_key(one | {"input_ids": torch.tensor([1.0, 2.0])})


def test_padding_is_hidden_by_mask_and_label():
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "labels": torch.ones(2, 3), "row": [1]}
    wide = padded(batch, 5)
    assert wide["attention_mask"].sum() == 6
    assert (wide["labels"][:, 3:] == -100).all()
    assert wide["input_ids"].shape == (2, 5)
    assert padded(batch, 2) is batch


@pytest.mark.parametrize("task", ["text-classification", "image-classification", "causal-lm", "sft"])
def test_a_row_has_the_same_bytes_whatever_else_the_data_holds(prepared, task):
    options = {"packing": False} if task in ("causal-lm", "sft") else {}
    ready, name, loaded = prepared(task, method={"name": "layers", "last": 1}, train=options)
    model = ready.method.apply(loaded.model, loaded).eval()
    steps = checking.planned_steps(ready, name, loaded)
    trunk = Trunk(name, loaded, torch.device("cpu"), "float32")
    with torch.no_grad():
        assert trunk.find(model, steps.together([0, 1])) == ""
        groups = Groups(steps, loaded)
        whole = {
            i: value
            for rows in groups.of(range(len(steps.examples)))
            for i, value in zip(rows, groups.run(model, trunk, rows), strict=True)
        }
        for i in range(0, len(steps.examples), 7):
            (alone,) = groups.run(model, trunk, [i])
            assert torch.equal(alone, whole[i])
    assert len(whole) == len(steps.examples) >= 30


# --------------------------------------------------------------------------- runs
def weights(run):
    return load_file(run.path / "model" / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def notes(run):
    return [line for line in run.read_json("data.json")["settings"] if "trunk" in line or "shared" in line]


@pytest.mark.parametrize(
    ("task", "method"), CELLS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_a_run_is_the_same_to_the_byte_whether_the_store_is_cold_warm_or_off(
    tiny_recipe, tmp_path, monkeypatch, shared, task, method
):
    options = OPTIONS if task in ("causal-lm", "sft") else OPTIONS | {"packing": None}
    recipe = tiny_recipe(task, method=method, train=options)
    cold, warm = (train(recipe, tmp_path / name, **QUIET) for name in ("cold", "warm"))
    assert "were there from earlier runs" in " ".join(notes(warm))
    assert "were there" not in notes(cold)[0]
    monkeypatch.setenv("TUNEWRIGHT_CACHE", "off")
    off = train(recipe, tmp_path / "off", **QUIET)
    assert "switches it off" in " ".join(notes(off))
    assert same(weights(cold), weights(warm))
    assert same(weights(cold), weights(off))


def test_a_solved_head_goes_through_the_same_store(tiny_recipe, tmp_path, shared):
    one = train(tiny_recipe(method="head"), tmp_path / "one", **QUIET)
    two = train(tiny_recipe(method="head"), tmp_path / "two", **QUIET)
    assert "were there from earlier runs" in notes(two)[0]
    assert same(weights(one), weights(two))
    other = train(tiny_recipe(method={"name": "head", "solver": "steps"}, train=OPTIONS | {"packing": None}),
                  tmp_path / "other", **QUIET)  # fmt: skip
    assert "were there from earlier runs" in notes(other)[0], "another method, the same trunk"


@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
def test_a_higher_boundary_goes_on_from_a_lower_one_to_the_same_bytes(tiny_recipe, tmp_path, monkeypatch, shared, task):
    monkeypatch.setenv("TUNEWRIGHT_CACHE", "off")
    plain = train(tiny_recipe(task, method="head"), tmp_path / "plain", **QUIET)
    monkeypatch.delenv("TUNEWRIGHT_CACHE")
    layers = {"name": "layers", "last": 1}
    train(tiny_recipe(task, method=layers, train=OPTIONS | {"packing": None}), tmp_path / "layers", **QUIET)
    head = train(tiny_recipe(task, method="head"), tmp_path / "head", **QUIET)
    assert "went on from what earlier runs kept further down" in notes(head)[0]
    assert same(weights(plain), weights(head))


def test_only_missing_rows_are_computed(tiny_recipe, tmp_path, monkeypatch, shared):
    counted = []
    plain = Groups.run

    def counting(self, model, trunk, rows, **more):
        counted.extend(rows)
        return plain(self, model, trunk, rows, **more)

    train(tiny_recipe(method="head", data={"train": str(write_text_rows(tmp_path / "few.csv", 60))}), tmp_path / "a",
          **QUIET)  # fmt: skip
    few = (tmp_path / "few.csv").read_text().splitlines()
    more = write_text_rows(tmp_path / "more.csv", 80, seed=1).read_text().splitlines()
    (tmp_path / "both.csv").write_text("\n".join([*few, *more[1:9]]) + "\n")
    monkeypatch.setattr(Groups, "run", counting)
    monkeypatch.setattr(Groups, "are_pure", lambda self, model, trunk: True)
    run = train(tiny_recipe(method="head", data={"train": str(tmp_path / "both.csv")}), tmp_path / "b", **QUIET)
    assert 0 < len(counted) < 30, notes(run)  # 8 new rows, and a few that were held out before


@pytest.mark.parametrize("state", ["warm", "gone", "damaged", "off"])
def test_a_resumed_run_is_the_same_whatever_became_of_the_store(tiny_recipe, tmp_path, monkeypatch, shared, state):
    """Begun on a store that a run on the shorter rows had filled; the boundary moves as it goes."""
    options = OPTIONS | {"packing": None, "save_steps": 2}
    method = {"name": "layers", "unfreeze": 0.6}
    recipe = tiny_recipe(method=method, train=options)
    head, *rows = Path(recipe.data.train).read_text().splitlines()
    (tmp_path / "short.csv").write_text("\n".join([head, *sorted(rows, key=len)[:40]]) + "\n")
    train(tiny_recipe(method=method, train=options, data={"train": str(tmp_path / "short.csv"), "holdout": 0.3}),
          tmp_path / "other", **QUIET)  # fmt: skip
    whole = train(recipe, tmp_path / "whole", **QUIET)
    assert "were there from earlier runs" in notes(whole)[0]
    with pytest.raises(RuntimeError, match="power"):
        train(recipe, tmp_path / "cut", callbacks=[Stops(5)], **QUIET)
    if state == "gone":
        cache_folder.clear(shared)
    if state == "damaged":
        for rows in shared.glob("*/*.rows"):
            rows.write_bytes(bytes(rows.stat().st_size))
    if state == "off":
        monkeypatch.setenv("TUNEWRIGHT_CACHE", "off")
    cut = train(recipe, tmp_path / "cut", **QUIET)
    assert same(weights(whole), weights(cut))
    if state == "damaged":
        assert any("thrown away" in line for line in notes(cut))


def test_another_trunk_is_another_space(prepared):
    """Weights, precision and place are told apart; names of labels and what lies above are not."""
    ready, task, loaded = prepared("text-classification", method={"name": "layers", "last": 1})
    model = ready.method.apply(loaded.model, loaded).eval()
    steps = checking.planned_steps(ready, task, loaded)

    def name(precision="float32"):
        trunk = Trunk(task, loaded, torch.device("cpu"), precision)
        with torch.no_grad():
            assert trunk.find(model, steps.together([0, 1])) == ""
        return trunk.fingerprint()

    first = name()
    assert name() == first
    assert name("bf16") != first
    with torch.no_grad():
        loaded.model.classifier.weight.add_(1.0)
        loaded.model.config.id2label = {0: "x", 1: "y"}
        assert name() == first
        next(loaded.model.get_submodule(loaded.layout.blocks[0]).parameters()).view(-1)[0].add_(1e-3)
    assert name() != first


def test_where_neighbours_change_a_rows_digits_nothing_is_shared(tiny_recipe, tmp_path, monkeypatch, shared):
    plain = Groups.run

    def impure(self, model, trunk, rows, *, shift=0, lower=None):
        return [value + shift * 1e-6 for value in plain(self, model, trunk, rows, shift=shift, lower=lower)]

    monkeypatch.setattr(Groups, "run", impure)
    run = train(tiny_recipe(method="head"), tmp_path / "run", **QUIET)
    assert "not shared with other runs: this machine gives a row other digits" in notes(run)[0]
    assert cache_folder.segments(shared) == []


def test_a_full_disk_costs_nothing_but_the_sharing(tiny_recipe, tmp_path, monkeypatch, shared):
    monkeypatch.setattr(cache_folder, "MARGIN", 1 << 40)
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    run = train(tiny_recipe(method="head"), tmp_path / "run", **QUIET)
    assert any("not shared with other runs: less than" in line for line in notes(run))
    assert cache_folder.segments(shared) == []


# ------------------------------------------------------------------------- the verb
def test_the_verb_lists_and_clears(cli, shared):
    FeatureStore(cache_folder.folder()[0]).write("0123456789abcdef", some(), {"model": "base", "blocks": "5 of 6"})
    code, out, _ = cli("cache", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["folder"] == str(shared)
    assert [(e["model"], e["blocks"], e["name"]) for e in found["entries"]] == [("base", "5 of 6", "0123456789ab")]
    assert found["bytes"] == found["entries"][0]["bytes"] > 100
    assert found["entries"][0]["used"] <= time.time()
    _, out, _ = cli("cache")
    assert "base" in out
    code, out, _ = cli("cache", "clear", "--json")
    assert code == 0
    assert json.loads(out)["freed"] == found["bytes"]
    assert not shared.exists()
    assert json.loads(cli("cache", "--json")[1])["entries"] == []
