"""Data that is right: read, mapped, split and accounted for. What is wrong stands in test_bad_input.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tunewright import find
from tunewright.contracts import Field
from tunewright.data import inspection, records, sources
from tunewright.data.raw import natural
from tunewright.data.split import split
from tunewright.recipe import DataSpec

TEXT = {"text": Field("the text", "text", ("sentence",)), "label": Field("the class", "label", ("target",))}
IMAGE = {"image": Field("the picture", "image", ("file",)), "label": Field("the class", "label", ("target",))}
SHARED = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the real data in {SHARED}")


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some(num: int, start: int = 0, labels: str = "ab") -> list[dict]:
    return [{"text": f"sentence number {n}", "label": labels[n % len(labels)]} for n in range(start, start + num)]


def load(train: Path, fields=TEXT, *, choose: bool = False, **options) -> records.Data:
    options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    data, faults = records.load(DataSpec(str(train), **options), fields, seed=0, validation=choose)
    assert data is not None, [str(fault) for fault in faults]
    return data


def ids(rows: list[dict]) -> set[str]:
    return {row["row"] for row in rows}


# --------------------------------------------------------------------- readers
def test_every_reader_offers_suffixes_and_read():
    names = find.names("data/readers")
    assert len(names) >= 3
    taken = Counter(suffix for name in names for suffix in sources.suffixes(name))
    assert max(taken.values()) == 1, "two readers claim one suffix"
    for name in names:
        assert find.summary("data/readers", name)


def test_reading_data_does_not_import_torch(tmp_path):
    write(tmp_path / "d.jsonl", some(20))
    code = (
        "import sys; from collections import namedtuple; from tunewright.data.records import load;"
        "from tunewright.recipe import DataSpec; F = namedtuple('F', 'help kind aliases');"
        f"spec = DataSpec({str(tmp_path / 'd.jsonl')!r});"
        "d, _ = load(spec, {'text': F('', 'text', ())}, seed=0, validation=False);"
        "print(len(d.train), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["18", "False"]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.ndjson", "d.json", "D.CSV"])
def test_each_format_gives_the_same_rows(tmp_path, name):
    rows, path = some(20), tmp_path / name
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        path.write_text(f"text{separator}label\r\n" + "".join(f"{r['text']}{separator}{r['label']}\r\n" for r in rows))
    else:
        write(path, rows) if suffix != ".json" else path.write_text(json.dumps(rows, indent=1))
    data = load(path)
    found = sorted(data.train + data.test, key=lambda row: natural(row["row"]))
    assert [(row["text"], row["label"]) for row in found] == [(row["text"], row["label"]) for row in rows]
    first = {"csv": "line 2", "tsv": "line 2", "json": "row 1"}.get(suffix[1:], "line 1")
    assert (found[0]["where"], found[0]["extra"]) == (f"{name} {first}", {})
    assert found[0]["row"] == f"{name}:{first.split()[1]}"


def test_whole_numbers_and_truth_values_are_labels(tmp_path):
    for labels, expected in (((0, 1), ("0", "1")), ((False, True), ("false", "true"))):
        rows = [{"text": f"number {n}", "label": labels[n % 2]} for n in range(20)]
        assert load(write(tmp_path / "d.jsonl", rows)).labels == expected


def test_labels_stand_in_natural_order(tmp_path):
    names = ["10", "2", "1", "b10", "B2"]
    rows = [{"text": f"number {n}", "label": names[n % 5]} for n in range(100)]
    assert load(write(tmp_path / "d.jsonl", rows)).labels == ("1", "2", "10", "B2", "b10")


def test_a_task_without_labels_loads_without(tmp_path):
    data = load(write(tmp_path / "d.jsonl", some(20)), {"text": TEXT["text"]})
    assert data.labels == ()
    assert data.facts["labels"] == {}
    assert data.train[0]["extra"]["label"] in "ab"


def test_the_recipes_columns_win_over_names(tmp_path):
    rows = [{"text": "not this", "body": f"this {n}", "label": "ab"[n % 2]} for n in range(20)]
    data = load(write(tmp_path / "d.jsonl", rows), columns={"text": "body"})
    assert all(row["text"].startswith("this") and row["extra"] == {"text": "not this"} for row in data.train)


def test_the_one_column_left_is_guessed_and_said(tmp_path):
    rows = [{"text": row["text"], "mood": row["label"]} for row in some(20)]
    data = load(write(tmp_path / "d.jsonl", rows))
    assert data.labels == ("a", "b")
    assert any('"mood" is read as label' in note for note in data.notes)


# -------------------------------------------------------------------- splitting
def make(num: int, rng: random.Random, classes: str = "aaaaabbbc") -> list[dict]:
    return [
        {
            "row": f"f:{n}",
            "text": f"t{rng.randrange(num)}",
            "label": rng.choice(classes),
            "g": str(rng.randrange(num // 4)),
        }
        for n in range(num)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_copies_and_groups_never_stand_on_both_sides(seed):
    rng = random.Random(seed)
    rows = make(rng.randrange(20, 300), rng)
    for group in (None, lambda row: row["g"]):
        kept, held = split(rows, 0.1, seed=seed, key=lambda r: r["text"], stratify=lambda r: r["label"], group=group)
        assert len(kept) + len(held) == len(rows)
        assert kept
        assert not {r["text"] for r in kept} & {r["text"] for r in held}
        assert group is None or not {r["g"] for r in kept} & {r["g"] for r in held}
        assert {r["label"] for r in held} <= {r["label"] for r in kept}
        assert held or group  # small random groups may chain all rows together


@pytest.mark.parametrize("seed", range(20))
def test_every_class_of_ten_rows_has_its_share(seed):
    rng = random.Random(seed)
    rows = [row | {"text": row["row"]} for row in make(rng.randrange(40, 400), rng)]
    share = rng.choice([0.1, 0.2, 0.5])
    _, held = split(rows, share, seed=seed, key=lambda r: r["text"], stratify=lambda r: r["label"])
    counts, there = Counter(r["label"] for r in rows), Counter(r["label"] for r in held)
    assert len(held) == int(len(rows) * share + 0.5)
    for name, count in counts.items():
        assert abs(there[name] - count * share) < 1


def test_the_order_of_the_rows_changes_nothing():
    rows = make(200, random.Random(1))
    options = {"seed": 3, "key": lambda r: r["text"], "stratify": lambda r: r["label"], "group": lambda r: r["g"]}
    shuffled = random.Random(2).sample(rows, len(rows))
    assert ids(split(rows, 0.2, **options)[1]) == ids(split(shuffled, 0.2, **options)[1])


def test_the_split_is_the_same_on_every_machine_and_another_with_another_seed():
    rows = [{"row": f"d.csv:{n}"} for n in range(2, 32)]
    held = [sorted(ids(split(rows, 0.1, seed=seed, key=lambda r: r["row"])[1])) for seed in (0, 1)]
    # by hand: the three smallest of `printf '0\x1fd.csv:N' | sha256sum`
    assert held[0] == ["d.csv:11", "d.csv:27", "d.csv:8"]
    assert held[1] != held[0]


def test_many_classes_of_few_rows_still_give_a_tenth():
    rows = [{"row": f"f:{n}", "label": str(n // 4)} for n in range(400)]
    kept, held = split(rows, 0.1, seed=0, key=lambda r: r["row"], stratify=lambda r: r["label"])
    assert len(held) == 40
    assert len({r["label"] for r in kept}) == 100


def test_rows_that_cannot_be_parted_stay_together():
    same = [{"row": f"f:{n}", "text": "the same"} for n in range(10)]
    assert split(same, 0.1, seed=0, key=lambda r: r["text"]) == (same, [])
    two = [{"row": f"f:{n}", "text": f"t{n // 5}"} for n in range(10)]
    assert [len(side) for side in split(two, 0.1, seed=0, key=lambda r: r["text"])] == [5, 5]


def test_validation_is_a_tenth_of_the_training_rows_and_leaves_the_test_set_alone(tmp_path):
    path = write(tmp_path / "d.jsonl", some(200))
    without, with_it = load(path), load(path, choose=True)
    assert [len(s) for s in (without.train, without.validation, without.test)] == [180, 0, 20]
    assert [len(s) for s in (with_it.train, with_it.validation, with_it.test)] == [162, 18, 20]
    assert ids(without.test) == ids(with_it.test)


def test_a_group_column_keeps_its_rows_on_one_side(tmp_path):
    rows = [row | {"patient": str(n % 25)} for n, row in enumerate(some(100, labels="abb"))]
    data = load(write(tmp_path / "d.jsonl", rows), group="patient")
    sides = [{row["extra"]["patient"] for row in side} for side in (data.train, data.test)]
    assert not sides[0] & sides[1]
    assert data.test


# ------------------------------------------------------------- between the sets
def test_training_rows_that_stand_in_the_test_set_are_dropped_and_counted(tmp_path):
    train = write(tmp_path / "train.jsonl", some(20))
    test = write(tmp_path / "test.jsonl", [{"text": " sentence  number 3 ", "label": "b"}, *some(4, 100)])
    data = load(train, test=test)
    assert "train.jsonl:4" not in ids(data.train)
    assert len(data.train) == 19
    assert data.facts["overlap_dropped"] == 1
    assert data.facts["files"][0]["dropped"] == {"also in the test set": 1}
    assert any("1 training rows dropped" in note for note in data.notes)


def test_copies_and_contradictions_are_counted_with_an_example(tmp_path):
    rows = [*some(20), {"text": "sentence number 0", "label": "b"}, {"text": "sentence number 1", "label": "b"}]
    data = load(write(tmp_path / "d.jsonl", rows))
    assert data.facts["duplicates"] == {"train": 2}
    assert data.facts["conflicts"] == 1
    assert any("d.jsonl line 1 says a, d.jsonl line 21 says b" in note for note in data.notes)


def test_row_ids_stay_unique_where_files_share_a_name(tmp_path):
    train, test = write(tmp_path / "one" / "data.jsonl", some(20)), write(tmp_path / "two" / "data.jsonl", some(6, 50))
    data = load(train, test=test)
    assert "test/data.jsonl:3" in ids(data.test)
    assert "train/data.jsonl:3" in ids(data.train)
    assert len(data.facts["split"]) == 26


# ---------------------------------------------------------------------- folders
def photos(root: Path, *, num: int = 6, shade: int = 0) -> Path:
    from PIL import Image

    for n, name in enumerate(("ants", "bees")):
        (root / name).mkdir(parents=True)
        for number in range(1, num + 1):
            color = (shade, 20 * number, 100 * n)
            Image.new("RGB", (16, 16), color).save(root / name / f"{number}.png")
    return root


def test_a_folder_with_train_and_test_inside_is_taken_as_split(tmp_path):
    for n, name in enumerate(("train", "val", "test")):
        photos(tmp_path / "data" / name, shade=50 * n)
    data = load(tmp_path / "data", IMAGE)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [12, 12, 12]
    assert data.train[0]["row"] == "train/ants/1.png"
    assert data.train[0]["image"] == str((tmp_path / "data/train/ants/1.png").resolve())
    assert any("already split" in note for note in data.notes)


def test_a_folder_without_test_inside_gives_some_of_its_training_rows(tmp_path):
    for n, name in enumerate(("train", "val")):
        photos(tmp_path / "data" / name, num=10, shade=50 * n)
    data = load(tmp_path / "data", IMAGE)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [18, 20, 2]
    assert all(row["row"].startswith("train/") for row in data.train + data.test)


def test_train_may_be_a_class(tmp_path):
    photos(tmp_path / "data", num=8)
    (tmp_path / "data" / "ants").rename(tmp_path / "data" / "train")
    assert load(tmp_path / "data", IMAGE).labels == ("bees", "train")


def test_two_folders_have_their_split_in_the_row_id(tmp_path):
    train, test = photos(tmp_path / "data/train"), photos(tmp_path / "data/val", shade=50)
    data = load(train, IMAGE, test=test)
    assert data.test[0]["row"] == "test/ants/1.png"
    assert data.test[0]["where"] == "val/ants/1.png"
    assert data.validation == []


def test_a_table_of_images_is_rooted_in_its_folder(tmp_path):
    photos(tmp_path / "photos")
    lines = "".join(f"photos/{name}/{n}.png,{name}\n" for name in ("ants", "bees") for n in range(1, 7))
    (tmp_path / "d.csv").write_text(f"file,target\n{lines}")
    data = load(tmp_path / "d.csv", IMAGE)
    assert Path(data.train[0]["image"]).is_file()
    assert Path(data.train[0]["image"]).is_absolute()


def test_equal_images_never_stand_on_both_sides(tmp_path):
    root = photos(tmp_path / "data", num=10)
    for n in range(1, 11):
        (root / "ants" / f"copy {n}.png").write_bytes((root / "ants" / f"{n}.png").read_bytes())
    data = load(root, IMAGE, holdout=0.4)
    sides = [{Path(row["image"]).read_bytes() for row in side} for side in (data.train, data.test)]
    assert not sides[0] & sides[1]
    assert data.facts["duplicates"] == {"train": 10}


# ------------------------------------------------------------------------ facts
def test_facts_are_json_and_account_for_every_row(tmp_path):
    rows = [*some(30), {"text": "", "label": "a"}, {"text": "x", "label": None}]
    path = write(tmp_path / "d.jsonl", rows)
    data = load(path, on_bad_row="quarantine", choose=True)
    facts = json.loads(json.dumps(data.facts))
    (file,) = facts["files"]
    assert file["rows_read"] == 32
    assert file["rows_kept"] == 30 == len(facts["split"])
    assert file["dropped"] == {"text: the text is empty": 1, "label: the label is null": 1}
    assert Counter(facts["split"].values()) == {"train": 24, "validation": 3, "test": 3}
    assert sum(n for counts in facts["labels"].values() for n in counts.values()) == 30
    done = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True)
    assert file["sha256"] == done.stdout.split()[0]
    assert str(tmp_path) not in json.dumps(facts)
    assert data.notes == facts["notes"]


def test_classes_with_few_rows_are_noted(tmp_path):
    data = load(write(tmp_path / "d.jsonl", [*some(20), {"text": "alone", "label": "rare"}]))
    assert any("rare (1)" in note for note in data.notes)
    assert "rare" in data.labels


# ------------------------------------------------------------------- prediction
def test_rows_to_predict_need_no_label(tmp_path):
    (tmp_path / "d.csv").write_text("id,text\n1,good one\n2,bad one\n")
    rows, table, faults = records.read_inputs(tmp_path / "d.csv", TEXT, columns={}, required=["text"])
    assert not faults
    assert [(row["text"], row["extra"]) for row in rows] == [("good one", {"id": "1"}), ("bad one", {"id": "2"})]
    assert table.columns == ("id", "text")
    assert [row.values["id"] for row in table.rows] == ["1", "2"]


def test_pictures_to_predict_need_no_class_folders(tmp_path):
    photos(tmp_path / "data")
    rows, _, faults = records.read_inputs(tmp_path / "data" / "ants", IMAGE, columns={}, required=["image"])
    assert not faults
    assert [row["row"] for row in rows] == [f"{n}.png" for n in range(1, 7)]


def test_faults_of_rows_to_predict_are_named(tmp_path):
    (tmp_path / "d.csv").write_text("text,id\ngood one,1\n,2\n")
    _, _, faults = records.read_inputs(tmp_path / "d.csv", TEXT, columns={}, required=["text"])
    assert [(fault.where, fault.field) for fault in faults] == [("d.csv line 3", "text")]
    _, _, faults = records.read_inputs(tmp_path / "nope.csv", TEXT, columns={}, required=["text"])
    assert "no such file" in str(faults[0])


def test_equal_content_has_an_equal_key():
    one, two = "caf\u00e9  au lait", "cafe\u0301 au\nlait"
    keys = [inspection.content_key({"text": text, "label": "a"}, TEXT) for text in (one, two, "cafe au lait")]
    assert keys[0] == keys[1] != keys[2]


# -------------------------------------------------------------------- real data
@real_data
def test_sst2_loads_as_it_is():
    data = load(
        SHARED / "sst2/train.jsonl", validation=SHARED / "sst2/validation.jsonl", test=SHARED / "sst2/test.jsonl"
    )
    assert (len(data.validation), len(data.test), data.labels) == (872, 1821, ("0", "1"))
    assert len(data.train) + data.facts["overlap_dropped"] == 4000


@real_data
def test_sms_spam_keeps_its_copies_on_one_side():
    data = load(SHARED / "sms_spam/train.jsonl", choose=True)
    keys = [{inspection.content_key(row, TEXT) for row in s} for s in (data.train, data.validation, data.test)]
    assert len(set.union(*keys)) == sum(len(own) for own in keys)
    assert len(data.test) == 300
    assert data.facts["duplicates"]["train"] > 100


@real_data
def test_hymenoptera_loads_from_two_folders():
    data = load(SHARED / "hymenoptera/train", IMAGE, test=SHARED / "hymenoptera/val")
    assert (len(data.train) + data.facts["overlap_dropped"], len(data.test), data.labels) == (
        245,
        153,
        ("ants", "bees"),
    )


@real_data
def test_telco_churn_stays_text():
    table = {"text": Field("", "text"), "label": Field("", "label")}
    data = load(SHARED / "telco_churn/telco_churn.csv", table, columns={"text": "customerID", "label": "Churn"})
    assert len(data.train) + len(data.test) == 7043
    assert isinstance(data.train[0]["extra"]["tenure"], str)


def test_twenty_thousand_rows_load_in_a_second_or_so(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "".join(f'"some words, number {n}",{"abc"[n % 3]}\n' for n in range(20_000)))
    start = time.process_time()
    data = load(path)
    assert len(data.test) == 2_000
    assert time.process_time() - start < 5  # 0.6 s measured; the limit leaves room for a slow machine
