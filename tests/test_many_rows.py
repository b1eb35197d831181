"""Many rows: in a file of our own instead of in memory, and everything that follows from them the same."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import tracemalloc
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import tiny_tree

from tunewright.contracts import Field
from tunewright.data import batches, records, rows, spool, texts
from tunewright.data.batches import Examples
from tunewright.data.packed_examples import packed, unpacked
from tunewright.data.rows import Rows, chosen, joined
from tunewright.data.split import nested, split
from tunewright.models import layout
from tunewright.recipe import DataSpec, Recipe
from tunewright.rundir import RunDir
from tunewright.runs.training import train

TEXT = {"text": Field("the text", "text", ("sentence",)), "label": Field("the class", "label", ("target",))}
VALUES = [
    {"row": "a.csv:1", "text": 'tab\t"quote" ü 漢 \u2028 \x00', "extra": {"n": 3, "x": 0.1, "none": None, "yes": True}},
    {"row": "a.csv:2", "text": "\ud83d\ude00 \ud800", "extra": {"deep": [[1, 2.5], {"k": ["v"]}], "big": 2**70}},
    {"row": "a.csv:3", "text": "", "extra": {}},
]


@pytest.fixture
def in_files(monkeypatch, tmp_path):
    """As if three rows were many; files are made in a folder of their own."""
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(rows, "MOST_ROWS", 3)
    monkeypatch.setattr(batches, "MANY", 3)
    monkeypatch.setattr(spool, "BLOCK", 200)
    return folder


def full(*given):
    raise OSError(errno.ENOSPC, "No space left on device")


# -------------------------------------------------------------------- the file
def test_rows_come_back_as_they_went(in_files):
    held = Rows(VALUES * 5)
    assert held.store.in_file
    assert list(held) == VALUES * 5
    assert held[-1] == VALUES[-1]
    assert held[1:3] == VALUES[1:3]
    assert len(held) == 15
    with pytest.raises(IndexError):
        held[15]


def test_few_rows_stay_the_very_objects(in_files):
    held = Rows(VALUES)
    assert not held.store.in_file
    assert held[0] is VALUES[0]


def test_long_rows_are_many_sooner(monkeypatch):
    monkeypatch.setattr(rows, "MOST_BYTES", 150_000)
    assert not Rows([{"text": "short"}] * 150).store.in_file
    assert Rows([{"text": "long" * 200}] * 150).store.in_file


def test_nobody_else_can_read_the_file_and_none_is_left(in_files):
    held = Rows(VALUES * 5)
    facts = os.fstat(held.store._spool._file)
    assert stat.S_IMODE(facts.st_mode) == 0o600
    assert facts.st_nlink == 0
    assert facts.st_size > 0
    assert list(in_files.iterdir()) == []
    handle = held.store._spool._file
    del held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_on_a_full_disk_rows_stay_in_memory_and_it_is_said(in_files, monkeypatch, tmp_path):
    data = loaded(written(tmp_path, 60))
    monkeypatch.setattr(os, "pwrite", full)
    held = Rows(VALUES * 9)
    assert list(held) == VALUES * 9
    assert not held.store.in_file
    again = loaded(written(tmp_path, 60))
    assert list(again.test) == list(data.test)
    assert any("in memory: the file for them cannot be written (No space left" in note for note in again.notes)


def test_without_a_place_for_files_rows_stay_in_memory_and_it_is_said(in_files, tmp_path):
    in_files.rmdir()
    data = loaded(written(tmp_path, 60))
    assert any("in memory: no file can be made for them" in note for note in data.notes)
    assert isinstance(data.train, list)


def test_chosen_and_joined_rows_lie_where_the_rows_lie(in_files):
    held, plain = Rows(VALUES * 5), VALUES * 5
    some = chosen(chosen(held, [9, 2, 5, 1]), [0, 3])
    assert isinstance(some, Rows)
    assert list(some) == [plain[9], plain[1]] == chosen(plain, [9, 1])
    more = joined(some, VALUES[2:])
    assert isinstance(more, Rows)
    assert list(more) == [plain[9], plain[1], VALUES[2]]
    assert joined(plain[:1], VALUES[2:]) == [plain[0], VALUES[2]]
    with pytest.raises(ValueError, match="grow"):
        some.append(VALUES[0])


# ------------------------------------------------------------- the same rows of data
def written(folder: Path, count: int) -> Path:
    """Rows with copies, contradictions, groups, bad rows and columns that nobody reads."""
    rng = random.Random(0)
    lines = [
        {"text": f"text number {rng.randrange(count * 4)} ü", "label": rng.choice("aab"),
         "who": f"w{rng.randrange(40)}", "n": i}
        for i in range(count)
    ]  # fmt: skip
    lines[7]["text"], lines[9]["label"], lines[11]["who"] = " ", None, None
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def loaded(train_file: Path, **options) -> records.Data:
    spec = DataSpec(str(train_file), **{"on_bad_row": "quarantine", **options})
    data, faults = records.load(spec, TEXT, seed=0, validation=True)
    assert data is not None, [str(fault) for fault in faults]
    return data


@pytest.mark.parametrize("options", [{}, {"group": "who"}, {"limit": 20}, {"test": True}, {"group": "who", "limit": 9}])
def test_data_are_the_same_in_memory_and_in_a_file(tmp_path, monkeypatch, options):
    train_file = written(tmp_path, 80)
    if "test" in options:
        lines = train_file.read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "test.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
        options = {"test": str(tmp_path / "test.jsonl")}
    plain = loaded(train_file, **options)
    monkeypatch.setattr(rows, "MOST_ROWS", 3)
    monkeypatch.setattr(spool, "BLOCK", 200)
    filed = loaded(train_file, **options)
    assert isinstance(filed.train, Rows)
    assert isinstance(plain.train, list)
    for name in ("train", "validation", "test"):
        assert list(getattr(filed, name)) == getattr(plain, name), name
    assert len(plain.train) >= 7
    assert len(plain.test) >= 2
    said = [note for note in filed.notes if "temporary file" in note]
    assert len(said) == 1
    assert [note for note in filed.notes if note not in said] == plain.notes
    for data, run in ((plain, RunDir(tmp_path / "plain")), (filed, RunDir(tmp_path / "filed"))):
        run.path.mkdir()
        run.write_json("data.json", data.facts | {"notes": []})
    assert (tmp_path / "filed/data.json").read_bytes() == (tmp_path / "plain/data.json").read_bytes()
    assert json.dumps(filed.facts["split"]) == json.dumps(plain.facts["split"])
    assert filed.facts["split"] == plain.facts["split"]
    assert plain.test[0]["row"] in filed.facts["split"]


def test_a_row_in_a_file_takes_less_than_100_bytes(tmp_path, monkeypatch):
    path = written(tmp_path, 1200)

    def held() -> float:
        tracemalloc.start()
        data = loaded(path)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return taken / (len(data.train) + len(data.validation) + len(data.test))

    assert held() > 500
    monkeypatch.setattr(rows, "MOST_ROWS", 50)
    monkeypatch.setattr(spool, "BLOCK", 2048)
    assert held() < 100


# --------------------------------------------------------------------- splitting
def as_it_is_defined(given, share, seed, group):
    """Rows held out, worked out with lists of rows: units in the order of chance, taken while they help."""
    chance = {r["row"]: sha256(f"{seed}\x1f{r['row']}".encode()).hexdigest() for r in given}
    units: list[list[dict]] = []
    for row in given:
        same = [
            u for u in units if any(o["text"] == row["text"] or (group and o["g"] and o["g"] == row["g"]) for o in u)
        ]
        units = [u for u in units if u not in same] + [[r for u in same for r in u] + [row]]
    left = Counter(r["label"] for r in given)
    exact = {name: n * share for name, n in left.items()}
    open_ = {name: int(n) for name, n in exact.items()}
    rank = {name: sha256(f"{seed}\x1f{name}".encode()).hexdigest() for name in exact}
    spare = int(sum(exact.values()) + 0.5) - sum(open_.values())
    for name in sorted(exact, key=lambda name: (open_[name] - exact[name], rank[name]))[:spare]:
        open_[name] += 1
    held: set[str] = set()

    def cost(unit):
        return sum(abs(open_[n] - k) - abs(open_[n]) for n, k in Counter(r["label"] for r in unit).items())

    def hold(unit):
        counts = Counter(r["label"] for r in unit)
        if all(left[n] > k for n, k in counts.items()):
            for n, k in counts.items():
                open_[n], left[n] = open_[n] - k, left[n] - k
            held.update(r["row"] for r in unit)

    units.sort(key=lambda unit: min(chance[r["row"]] for r in unit))
    for unit in units:
        if cost(unit) < 0:
            hold(unit)
    for unit in sorted(units, key=cost) if not held else ():
        if not held:
            hold(unit)
    return held


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_are_held_out_as_defined(grouped):
    rng, seen = random.Random(grouped), 0
    for seed in range(40):
        given = [
            {
                "row": f"f:{i}",
                "label": rng.choice("aabc"),
                "text": f"{rng.randrange(30)}",
                "g": rng.choice(["", "x", "y"]),
            }
            for i in range(rng.randrange(2, 40))
        ]  # fmt: skip
        share = rng.choice([0.05, 0.1, 0.3])
        group = (lambda r: r["g"]) if grouped else None
        kept, held = split(given, share, seed=seed, key=lambda r: r["text"], stratify=lambda r: r["label"], group=group)
        assert {r["row"] for r in held} == as_it_is_defined(given, share, seed, grouped)
        assert [r for r in given if r in kept] == kept
        seen += len(held)
    assert seen > 60


def test_fewer_rows_are_drawn_as_defined():
    rng = random.Random(0)
    given = [{"row": f"f:{i}", "label": rng.choice("aab"), "g": rng.choice(["", "x", "y"])} for i in range(50)]

    def chance(text):
        return sha256(f"3\x1f{text}".encode()).hexdigest()

    order = sorted(given, key=lambda r: (chance(f"group {r['g'] or r['row']}"), chance(f"limit {r['row']}")))
    by_class = defaultdict(list)
    for row in order:
        by_class[row["label"]].append(row)
    places = [(i / len(c), chance(f"limit {r['row']}"), r["row"]) for c in by_class.values() for i, r in enumerate(c)]
    wanted = {row for _, _, row in sorted(places)[:21]}
    taken = nested(given, 21, seed=3, stratify=lambda r: r["label"], group=lambda r: r["g"])
    assert taken == [r for r in given if r["row"] in wanted]


# -------------------------------------------------------------------------- texts
def test_a_text_in_pieces_is_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 3)
    rng, path, bad = random.Random(0), tmp_path / "t.txt", 0
    for _ in range(200):
        raw = b"".join(
            rng.choices([b"ab", "ü漢".encode(), b"\r\n", b"\n", b"\xff", b"\xe6\xbc"], [6, 6, 3, 3, 1, 1], k=9)
        )
        path.write_bytes(raw)
        text, _, faults = texts.read_text(path)
        assert "".join(text.pieces()) == text.whole() == raw.decode(errors="replace")
        assert "\n".join(text.lines()) == text.whole().removesuffix("\n")
        valid = raw == raw.decode(errors="ignore").encode()
        assert (not faults) == valid
        bad += not valid
    assert 20 < bad < 180


# ----------------------------------------------------------------------- examples
EXAMPLE = {
    "row": "a:1 ü", "input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([[-100], [6]]), "length": 3,
    "weight": 0.1, "control": False, "label": None, "mask": torch.tensor([True, False]), "none": torch.tensor([]),
    "x": torch.tensor(2.5),
}  # fmt: skip


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def test_an_example_comes_back_as_it_went():
    found = unpacked(packed(EXAMPLE))
    assert list(found) == list(EXAMPLE)
    assert all(same(EXAMPLE[key], found[key]) for key in EXAMPLE)
    found["input_ids"][0] = 0  # its own memory


@pytest.mark.parametrize(
    "odd", [torch.zeros(40_000, dtype=torch.int64), torch.zeros(2, dtype=torch.bfloat16), (1, 2), {"k": 1}, [1]]
)
def test_what_is_large_or_odd_is_not_packed(odd):
    assert packed(EXAMPLE | {"odd": odd}) is None


def test_many_examples_are_encoded_once_and_kept_in_a_file(in_files):
    asked: list[str] = []

    def encode(record):
        asked.append(record["row"])
        return EXAMPLE | {"row": record["row"]}

    given = [{"row": f"r{i}"} for i in range(9)]
    examples = Examples(given, encode)
    for _ in range(2):
        for i in (3, 1, 8, 0, 2, 4, 5, 6, 7):
            found = examples[i]
            assert all(same((EXAMPLE | given[i])[key], found[key]) for key in EXAMPLE)
    assert sorted(asked) == [r["row"] for r in given]
    assert not examples._kept


def test_on_a_full_disk_memory_keeps_examples(in_files, monkeypatch):
    asked: list[str] = []

    def encode(record):
        asked.append(record["row"])
        return EXAMPLE | {"row": record["row"]}

    examples = Examples([{"row": f"r{i}"} for i in range(9)], encode)
    monkeypatch.setattr(os, "pwrite", full)
    assert [examples[i % 9]["row"] for i in range(18)] == [f"r{i % 9}" for i in range(18)]
    assert len(asked) == 9, "each is encoded once"
    assert "cannot be written (No space left on device)" in examples.why


def test_large_examples_stay_in_memory_while_it_reaches(in_files):
    pictures = Examples(
        [{"row": str(i)} for i in range(5)], lambda r: {"row": r["row"], "p": torch.zeros(20_000)}, 200_000
    )
    first, last = pictures[0], [pictures[i] for i in range(5)][-1]
    assert pictures[0] is first
    assert pictures[4] is not last


def test_the_table_of_positions_is_looked_for_once(monkeypatch):
    model = torch.nn.ModuleDict({"position_embeddings": torch.nn.Embedding(12, 2, padding_idx=1)})
    assert layout.max_positions(model) == 10
    monkeypatch.setattr(model, "named_modules", lambda: pytest.fail("gone through again"))
    assert layout.max_positions(model) == 10


# -------------------------------------------------------------------------- a run
@pytest.mark.slow
def test_a_run_is_the_same_run(tmp_path, in_files, monkeypatch):
    def run(name: str) -> Path:
        tree = tiny_tree("text-classification", tmp_path / "base")
        tree |= {"train": {"max_steps": 3, "precision": "float32"}, "evaluate": {"quick": True}}
        return train(Recipe.of(tree)[0], tmp_path / name, quiet=True, say=lambda text: None).path

    filed = run("filed")
    monkeypatch.setattr(rows, "MOST_ROWS", 10_000)
    monkeypatch.setattr(batches, "MANY", 10_000)
    plain = run("plain")
    for name in ("model/model.safetensors", "predictions.jsonl"):
        assert (filed / name).read_bytes() == (plain / name).read_bytes(), name
    facts = [json.loads((folder / "data.json").read_text(encoding="utf-8")) for folder in (filed, plain)]
    said = [note for note in facts[0]["notes"] if "temporary file" in note]
    assert len(said) == 1
    facts[0]["notes"].remove(said[0])
    assert facts[0] == facts[1]
