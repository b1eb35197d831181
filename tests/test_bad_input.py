"""Bad input, as people really send it: each is refused (or read right) and named by file, place, field and remedy.

The numbers are rows of a table of 66 bad inputs that were given to other tools (docs/promises.md); row 66 needs
preference pairs, which are no task yet. Nothing here is trained.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import pytest

from tunewright.contracts import Field
from tunewright.data import records
from tunewright.errors import DataError, Fault
from tunewright.recipe import DataSpec

TEXT = {"text": Field("the text", "text", ("sentence",)), "label": Field("the class", "label", ("target", "category"))}
IMAGE = {"image": Field("the picture", "image", ("file",)), "label": Field("the class", "label", ("target",))}
GOOD = [{"text": f"sentence number {n}", "label": "ab"[n % 2]} for n in range(20)]


def jsonl(path: Path, rows: list, *, end: str = "\n") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def table(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def csv_rows(separator: str = ",") -> str:
    return "".join(f"sentence number {n}{separator}{'ab'[n % 2]}\n" for n in range(20))


def picture(size: tuple[int, int] = (16, 16), mode: str = "RGB", format: str = "JPEG", shade: int = 0) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.effect_noise(size, 40 + shade).convert(mode).save(stream, format)
    return stream.getvalue()


def photos(root: Path, *, num_each: int = 12) -> Path:
    for shade, name in enumerate(("ants", "bees")):
        (root / name).mkdir(parents=True)
        for n in range(1, num_each + 1):
            (root / name / f"{n}.jpg").write_bytes(picture(shade=shade))
    return root


def load(train: Path, fields: dict[str, Field] = TEXT, **options) -> tuple[records.Data | None, list[Fault]]:
    options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return records.load(DataSpec(str(train), **options), fields, seed=0, validation=False)


def faults(train: Path, fields: dict[str, Field] = TEXT, **options) -> str:
    data, found = load(train, fields, **options)
    assert data is None
    assert found
    return str(DataError(found))


def rows(train: Path, fields: dict[str, Field] = TEXT, **options) -> tuple[list, records.Data]:
    data, found = load(train, fields, **options)
    assert data is not None, [str(fault) for fault in found]
    return data.train + data.validation + data.test, data


def says(text: str, *parts: str) -> None:
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in: {text}"


# ---------------------------------------------------------------- tables, 1 to 15
@pytest.mark.parametrize(("separator", "word"), [(";", "semicolon"), ("\t", "tab"), ("|", "bar")])
def test_row_01_another_delimiter_is_read_right_and_said(tmp_path, separator, word):
    found, data = rows(table(tmp_path / "d.csv", f"text{separator}label\n" + csv_rows(separator)))
    assert len(found) == 20
    assert {row["label"] for row in found} == {"a", "b"}
    assert any(word in note and "d.csv" in note for note in data.notes)


def test_row_02_latin_1_is_named_by_byte_line_and_guess(tmp_path):
    raw = "text,label\ngood one,a\ncafé crème,b\n".encode("latin-1")
    text = faults(table(tmp_path / "d.csv", raw))
    says(text, "d.csv line 3", "0xe9", f"offset {raw.index(0xE9)}", "latin-1", "café", "iconv", "UTF-8")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_row_03_04_files_with_a_byte_order_mark_are_read(tmp_path, encoding, suffix):
    text = "text,label\n" + csv_rows() if suffix == ".csv" else "".join(json.dumps(row) + "\n" for row in GOOD)
    found, data = rows(table(tmp_path / f"d{suffix}", text.replace("number", "numéro").encode(encoding)))
    assert found[0]["text"].startswith("sentence numéro")
    assert any("byte order mark" in note for note in data.notes)


def test_row_03_utf_16_without_a_mark_is_refused_with_the_way_out(tmp_path):
    says(faults(table(tmp_path / "d.csv", ("text,label\n" + csv_rows()).encode("utf-16-le"))), "UTF-16", "iconv")


def test_row_05_an_extra_comma_is_named_with_the_counts(tmp_path):
    text = faults(table(tmp_path / "d.csv", "text,label\n" + csv_rows() + "yes, really,a\nfine,b\n"))
    says(text, "d.csv line 22", "too many fields", "expected 2", "got 3", "yes", "quotation marks", "quarantine")


def test_row_06_a_short_row_is_named_with_the_counts(tmp_path):
    text = faults(table(tmp_path / "d.csv", "text,label\nonly a text\n" + csv_rows()))
    says(text, "d.csv line 2", "too few fields", "expected 2", "got 1", "only a text")


def test_row_06_a_short_last_row_means_the_file_may_be_cut_off(tmp_path):
    says(faults(table(tmp_path / "d.csv", "text,label\n" + csv_rows() + "the last")), "line 22", "cut off")


def test_row_07_an_unclosed_quote_is_named_where_it_opens(tmp_path):
    text = faults(table(tmp_path / "d.csv", 'text,label\ngood,a\n"never closed,b\nmore,a\nand more,b\n'))
    says(text, "d.csv line 3", "never closed", "lines 3 to 5")
    assert faults(tmp_path / "d.csv", on_bad_row="quarantine") == text, "it swallowed rows: leaving it out hides them"


def test_row_07_a_closed_quote_over_several_lines_is_one_row_named_by_its_first_line(tmp_path):
    found, _ = rows(table(tmp_path / "d.csv", 'text,label\n"two\nlines",a\nnext one,b\n' + csv_rows()))
    assert {row["row"] for row in found} >= {"d.csv:2", "d.csv:4"}
    assert next(row for row in found if row["row"] == "d.csv:2")["text"] == "two\nlines"


def test_row_08_labels_that_mix_numbers_and_words_are_pointed_out(tmp_path):
    _, data = rows(table(tmp_path / "d.csv", "text,label\n" + csv_rows().replace(",a", ",1").replace(",b", ",x")))
    assert any("(1)" in note and "(x)" in note for note in data.notes)


def test_row_09_na_null_none_nan_stay_text(tmp_path):
    words = ["NA", "null", "None", "nan", "N/A", "true"]
    found, _ = rows(table(tmp_path / "d.csv", "text,label\n" + "".join(f"{w},a\n" for w in words) + csv_rows()))
    assert {row["text"] for row in found} >= set(words)
    found, _ = rows(table(tmp_path / "e.csv", "text,label\n" + csv_rows().replace(",a", ",NA").replace(",b", ",null")))
    assert {row["label"] for row in found} == {"NA", "null"}


def test_row_10_labels_with_leading_zeros_keep_them(tmp_path):
    _, data = rows(table(tmp_path / "d.csv", "text,label\n" + csv_rows().replace(",a", ",007").replace(",b", ",010")))
    assert data.labels == ("007", "010")


def test_row_11_a_header_that_names_a_column_twice_is_refused(tmp_path):
    says(faults(table(tmp_path / "d.csv", "text,text,label\na,b,c\n")), "d.csv", '"text"', "2 times", "own name")


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.json"])
def test_row_12_an_empty_file_is_named(tmp_path, name):
    says(faults(table(tmp_path / name, "")), name, "empty (0 bytes)")
    says(faults(table(tmp_path / name, "\n \n")), name)


def test_row_13_a_header_without_rows_is_named(tmp_path):
    says(faults(table(tmp_path / "d.csv", "text,label\n")), "d.csv", "no rows", "text, label")
    says(faults(table(tmp_path / "d.json", "[]")), "d.json", "no rows")


def test_row_14_nul_characters_are_read_and_counted(tmp_path):
    found, data = rows(table(tmp_path / "d.csv", "text,label\none\0two,a\n" + csv_rows()))
    assert any(row["text"] == "one\0two" for row in found)
    assert any("1 NUL" in note for note in data.notes)


@pytest.mark.parametrize("first", ["a fine film that I would see again,good", "fine,good", "fine,1"])
def test_row_15_a_missing_header_is_noticed(tmp_path, first):
    text = faults(table(tmp_path / "d.csv", f"{first}\nbad film,bad\nnice film,good\nawful,bad\n"))
    says(text, "d.csv line 1", "looks like data", first.split(",")[1], "text,label")


def test_row_15_years_as_column_names_are_fine_where_the_needed_ones_are_there(tmp_path):
    found, _ = rows(table(tmp_path / "d.csv", "text,label,2020\n" + csv_rows().replace("\n", ",7\n")))
    assert found[0]["extra"] == {"2020": "7"}


def test_a_header_repeated_by_joining_files_is_no_row(tmp_path):
    says(
        faults(table(tmp_path / "d.csv", "text,label\n" + csv_rows() + "text,label\n")), "line 22", "repeats the header"
    )


# ------------------------------------------------------------------ JSON, 16 to 26
def test_row_16_a_broken_line_is_named_with_what_was_seen(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [GOOD[0], '{"text": "x" "label": "a"}', *GOOD]))
    says(text, "d.jsonl line 2", "no valid JSON", "',' delimiter", '{"text": "x" "label"', "expected an object such as")
    assert "cut off" not in text


def test_row_16_quarantine_keeps_the_other_rows_and_lists_the_broken_one(tmp_path):
    found, data = rows(jsonl(tmp_path / "d.jsonl", [*GOOD, "{broken", *GOOD[:3]]), on_bad_row="quarantine")
    assert len(found) == 23
    assert [bad["row"] for bad in data.facts["quarantined"]] == ["d.jsonl:21"]
    (file,) = data.facts["files"]
    assert (file["rows_read"], file["rows_kept"], sum(file["dropped"].values())) == (24, 23, 1)


def test_row_16_quarantine_stops_where_most_rows_are_bad(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [GOOD[0], GOOD[1], "{", "{", "{"]), on_bad_row="quarantine")
    says(text, "more than half", "3 of 5")


def test_row_17_a_truncated_last_line_says_the_file_may_be_cut_off(tmp_path):
    says(faults(jsonl(tmp_path / "d.jsonl", [*GOOD, '{"text": "an unfin'], end="")), "d.jsonl line 21", "cut off")
    says(faults(table(tmp_path / "d.json", json.dumps(GOOD)[:-9])), "d.json line 1", "cut off")


def test_row_18_a_number_where_text_belongs_is_named_by_kind(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [*GOOD, {"text": 5, "label": "a"}]))
    says(text, "d.jsonl line 21", 'field "text"', "expected a text", "a number (5)")


def test_row_19_a_column_that_only_some_rows_have_is_noted(tmp_path):
    _, data = rows(jsonl(tmp_path / "d.jsonl", [*GOOD, {"text": "x", "label": "a", "source": "web"}]))
    assert any('"source" (1)' in note for note in data.notes)
    assert any("not used: source" in note for note in data.notes)


@pytest.mark.parametrize(("value", "word"), [(None, "null"), ("", "empty"), (" \t\n", "empty")])
def test_row_20_null_and_empty_texts_are_all_named(tmp_path, value, word):
    text = faults(jsonl(tmp_path / "d.jsonl", [{"text": value, "label": "a"}, *GOOD, {"text": value, "label": "b"}]))
    says(text, "d.jsonl line 1,", "d.jsonl line 22,", 'field "text"', word, "on_bad_row=quarantine")


def test_row_20_a_field_that_one_row_lacks_is_named(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [*GOOD, {"text": "no label here"}]))
    says(text, "d.jsonl line 21", 'field "label"', "missing", "only text")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_row_21_nan_is_no_json(tmp_path, literal):
    text = faults(jsonl(tmp_path / "d.jsonl", [*GOOD, f'{{"text": "x", "label": "a", "score": {literal}}}']))
    says(text, "d.jsonl line 21", "no JSON number")


def test_row_22_invalid_utf_8_is_named_by_line_and_byte(tmp_path):
    raw = b'{"text": "fine", "label": "a"}\n{"text": "caf\xe9", "label": "b"}\n'
    says(faults(table(tmp_path / "d.jsonl", raw)), "d.jsonl line 2", f"offset {raw.index(0xE9)}", "latin-1")


def test_row_22_a_file_that_ends_inside_a_character_may_be_cut_off(tmp_path):
    says(faults(table(tmp_path / "d.jsonl", b'{"text": "caf\xc3')), "d.jsonl line 1", "cut off")


def test_row_23_a_lone_surrogate_is_named(tmp_path):
    says(faults(jsonl(tmp_path / "d.jsonl", [*GOOD, '{"text": "x\\ud800", "label": "a"}'])), "line 21", "surrogate")


def test_row_24_a_single_object_is_refused_with_an_example(tmp_path):
    text = faults(table(tmp_path / "d.json", json.dumps({"version": 1, "data": GOOD}, indent=1)))
    says(text, "d.json", "one object", "version, data", 'under "data"', "expected a list such as [{")


def test_row_24_a_line_that_is_no_object_is_named(tmp_path):
    says(faults(jsonl(tmp_path / "d.jsonl", [*GOOD, '["a", "b"]'])), "d.jsonl line 21", "not an object", '["a", "b"]')
    says(faults(table(tmp_path / "d.json", '[{"text": "x", "label": "a"}, 7]')), "d.json row 2", "not an object", "7")


def test_a_key_given_twice_is_refused(tmp_path):
    says(faults(jsonl(tmp_path / "d.jsonl", [*GOOD, '{"text": "a", "text": "b", "label": "a"}'])), '"text"', "twice")


def test_row_25_blank_lines_are_skipped_counted_and_keep_the_numbers(tmp_path):
    found, data = rows(jsonl(tmp_path / "d.jsonl", ["", GOOD[0], "  ", *GOOD[1:]]))
    assert len(found) == 20
    assert {"d.jsonl:2", "d.jsonl:4"} <= {row["row"] for row in found}
    assert any("2 blank lines" in note for note in data.notes)


# -------------------------------------------------------- files and folders, 27 to 36
def test_row_27_a_missing_file_is_named_with_near_names(tmp_path):
    jsonl(tmp_path / "train.jsonl", GOOD)
    text = faults(tmp_path / "trian.jsonl")
    says(text, "data.train", "no such file", str(tmp_path / "trian.jsonl"), 'Did you mean "train.jsonl"?')


def test_row_27_a_relative_path_is_shown_as_given_and_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says(faults(Path("nope/x.csv")), "got nope/x.csv", str(tmp_path / "nope" / "x.csv"), "is empty")


def test_row_27_a_missing_test_file_does_not_hide_the_faults_of_the_training_file(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [*GOOD, {"text": None, "label": "a"}])
    says(faults(train, test=tmp_path / "nope.jsonl"), "train.jsonl line 21", "data.test", "nope.jsonl")


def test_a_suffix_that_no_reader_knows_is_named_with_those_that_are(tmp_path):
    says(faults(table(tmp_path / "d.xlsx", "x")), '".xlsx"', ".csv", ".jsonl", "d.xlsx")


def test_an_unknown_format_is_named_with_the_nearest(tmp_path):
    found = faults(table(tmp_path / "d.csv", "x"), format="tabel")
    says(found, "data.format", "folder, hub, jsonl, parquet, table", '"table"')


def test_a_folder_where_a_file_belongs_is_refused_and_the_other_way_round(tmp_path):
    says(faults(tmp_path, format="jsonl"), "this is a folder", "expected a file")
    says(faults(table(tmp_path / "d.csv", "x"), format="folder"), "this is a file", "one folder per class")


def test_row_28_an_empty_folder_shows_the_layout(tmp_path):
    (tmp_path / "photos").mkdir()
    says(faults(tmp_path / "photos", IMAGE), "photos/", "an empty folder", "photos/ants/1.jpg", "photos/train/")


def test_row_28_images_without_class_folders_show_the_layout(tmp_path):
    (tmp_path / "1.jpg").write_bytes(picture())
    says(faults(tmp_path, IMAGE), "no class folders", "ants/1.jpg", "got 1.jpg")


def test_row_29_30_31_damaged_images_are_all_found_before_training_with_their_path(tmp_path):
    root = photos(tmp_path / "photos")
    whole = picture((64, 64))
    (root / "ants" / "20.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "ants" / "21.jpg").write_bytes(b"")
    (root / "bees" / "22.png").write_bytes(b"hello world")
    text = faults(root, IMAGE)
    says(text, "photos/ants/20.jpg", "damaged", "truncated")
    says(text, "photos/ants/21.jpg", "empty (0 bytes)", "photos/bees/22.png", "no image", "b'hello")


def test_row_32_images_that_are_not_rgb_are_counted(tmp_path):
    root = photos(tmp_path / "photos")
    (root / "ants" / "20.jpg").write_bytes(picture(mode="L"))
    (root / "ants" / "21.jpg").write_bytes(picture(mode="CMYK"))
    _, data = rows(root, IMAGE)
    assert any("2 images are not RGB (CMYK: 1, L: 1); converted" in note for note in data.notes)


def test_row_33_tiny_images_are_noted(tmp_path):
    root = photos(tmp_path / "photos")
    (root / "ants" / "20.png").write_bytes(picture((1, 1), format="PNG"))
    _, data = rows(root, IMAGE)
    assert any("1 images have a side under 8 pixels" in note for note in data.notes)


@pytest.mark.parametrize(("side", "got"), [(9000, "9000 x 9000"), (20000, "more than twice")])
def test_row_34_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side, got):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    root = photos(tmp_path / "photos")
    (root / "ants" / "20.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    says(faults(root, IMAGE), "photos/ants/20.png", "too large", "at most 64 million pixels", got)


def test_row_35_empty_classes_hidden_files_and_other_files_are_told(tmp_path):
    root = photos(tmp_path / "photos")
    (root / "wasps").mkdir()
    for junk in (".DS_Store", "Thumbs.db", "notes.txt"):
        (root / "ants" / junk).write_text("x")
    found, data = rows(root, IMAGE)
    notes = " ".join(data.notes)
    assert len(found) == 24
    assert data.labels == ("ants", "bees")
    says(notes, '"wasps" holds no images', "2 hidden files", "1 files that are no images (.txt)")


def test_row_36_class_folders_stand_in_natural_order(tmp_path):
    for name in ("1", "10", "2"):
        (tmp_path / name).mkdir()
        for n in range(4):
            (tmp_path / name / f"{n}.jpg").write_bytes(picture(shade=int(name)))
    _, data = rows(tmp_path, IMAGE)
    assert data.labels == ("1", "2", "10")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    root = photos(tmp_path / "photos")
    (tmp_path / "secret.jpg").write_bytes(picture())
    (root / "ants" / "20.jpg").symlink_to(tmp_path / "secret.jpg")
    says(faults(root, IMAGE), "photos/ants/20.jpg", "leads out of the folder")


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "link/secret.jpg"])
def test_a_path_in_a_table_that_leads_out_of_its_folder_is_refused(tmp_path, path):
    home = tmp_path / "home"
    photos(home / "photos")
    (home / "link").symlink_to(tmp_path)
    (tmp_path / "secret.jpg").write_bytes(picture())
    lines = "".join(f"photos/{name}/{n}.jpg,{name}\n" for name in ("ants", "bees") for n in range(1, 9))
    text = faults(table(home / "d.csv", f"image,label\n{lines}{path},ants\n"), IMAGE)
    says(text, "d.csv line 18", 'field "image"', "leads out", "home/", path)


def test_a_table_that_names_an_image_that_is_not_there_offers_the_nearest(tmp_path):
    photos(tmp_path / "photos")
    lines = "".join(f"photos/{name}/{n}.jpg,{name}\n" for name in ("ants", "bees") for n in range(1, 9))
    text = faults(table(tmp_path / "d.csv", f"image,label\n{lines}photos/ants/1.jpeg,ants\n"), IMAGE)
    says(text, "d.csv line 18", "no such image", "photos/ants/1.jpeg", "Did you mean")


# ---------------------------------------------------------------- labels, 37 to 42
def test_row_37_38_39_labels_unknown_to_training_are_listed_with_rows_and_the_nearest(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [{**row, "label": {"a": "good", "b": "bad"}[row["label"]]} for row in GOOD])
    wrong = [{"text": "p", "label": "goood"}, {"text": "q", "label": "bad"}, {"text": "r", "label": -1}]
    text = faults(train, test=jsonl(tmp_path / "test.jsonl", [*wrong, wrong[0]]))
    says(text, "test.jsonl line 1", "bad, good", '"goood" in 2 rows', "test.jsonl line 4", 'Did you mean "good"?')
    says(text, "test.jsonl line 3", '"-1" in 1 row')


def test_row_37_a_class_never_comes_from_the_test_set(tmp_path):
    train, test = jsonl(tmp_path / "train.jsonl", GOOD), [{"text": "p", "label": "c"}, {"text": "q", "label": "a"}]
    _, data = rows(train, test=jsonl(tmp_path / "test.jsonl", test), on_bad_row="quarantine")
    assert data.labels == ("a", "b")
    assert [row["text"] for row in data.test] == ["q"]
    assert data.facts["quarantined"][0]["row"] == "test.jsonl:1"


@pytest.mark.parametrize("label", ["spam", -100])
def test_row_40_41_one_class_only_is_refused(tmp_path, label):
    text = faults(jsonl(tmp_path / "d.jsonl", [{**row, "label": label} for row in GOOD]))
    says(text, "d.jsonl", 'field "label"', "one class only", f'"{label}"', "20 rows", "two or more")


def test_row_42_float_labels_are_refused(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [*GOOD, {"text": "x", "label": 0.5}]))
    says(text, "d.jsonl line 21", 'field "label"', "labels are floats", "regression is not built yet", "0.5")


def test_list_labels_are_refused(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [*GOOD, {"text": "x", "label": ["a", "b"]}]))
    says(text, "d.jsonl line 21", 'field "label"', "multi-label is not built yet", "a list")


def test_null_and_empty_labels_are_refused(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [*GOOD, {"text": "x", "label": None}, {"text": "y", "label": " "}]))
    says(text, "d.jsonl line 21", "label is null", "d.jsonl line 22", "label is empty")


def test_labels_that_are_different_in_nearly_every_row_are_refused(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [{"text": f"text {n}", "label": f"answer {n}"} for n in range(80)]))
    says(text, "d.jsonl", 'field "label"', "free text or numbers", "80 in 80 rows", "data.columns.label=")


# --------------------------------------------------------------- columns, 46 and 47
def test_row_46_a_known_other_name_is_taken_and_said(tmp_path):
    renamed = [{"Sentence": row["text"], "target": row["label"]} for row in GOOD]
    found, data = rows(jsonl(tmp_path / "d.jsonl", renamed))
    assert len(found) == 20
    assert data.facts["columns"] == {"train": {"text": "Sentence", "label": "target"}}
    says(" ".join(data.notes), 'column "Sentence" is read as text', 'column "target" is read as label')


def test_row_46_a_misspelt_column_is_asked_about_never_guessed(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [{"text": row["text"], "lable": row["label"]} for row in GOOD]))
    says(text, "d.jsonl", 'field "label"', "text, lable", 'Did you mean "lable"?', "data.columns.label=lable")


def test_row_46_a_mapped_column_that_is_not_there_is_named(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", GOOD), columns={"text": "txt"})
    says(text, "d.jsonl", 'no column "txt"', "text, label", "Set data.columns.text=text")


def test_row_46_a_mapped_field_that_the_task_does_not_have_is_named(tmp_path):
    says(faults(jsonl(tmp_path / "d.jsonl", GOOD), columns={"txet": "text"}), 'no field "txet"', 'Did you mean "text"?')


def test_row_47_wrong_columns_show_those_that_are_there(tmp_path):
    text = faults(jsonl(tmp_path / "d.jsonl", [{"question": "why?", "answer": "so", "id": n} for n in range(20)]))
    says(text, 'field "text"', 'field "label"', "question, answer, id", "data.columns.text=")


# ------------------------------------------------------------- too little, 48 and 49
def test_row_49_one_row_cannot_be_split(tmp_path):
    train = jsonl(tmp_path / "d.jsonl", GOOD[:1])
    says(faults(train), "one class only")
    says(faults(train, {"text": TEXT["text"]}), "no test set can be held out", "1 row", "data.test=")


def test_all_training_rows_standing_in_the_test_set_is_refused(tmp_path):
    train, test = jsonl(tmp_path / "train.jsonl", GOOD), jsonl(tmp_path / "test.jsonl", GOOD)
    says(faults(train, test=test), "no train rows are left", "20 dropped: also in the test set")


def test_all_faults_of_all_files_come_in_one_pass(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [*GOOD, {"text": "", "label": "a"}, {"text": 5, "label": None}])
    test = jsonl(tmp_path / "test.jsonl", [{"text": None, "label": "a"}, {"text": "x", "label": "z"}, "{"])
    _, found = load(train, test=test)
    assert len(found) == 6
    assert [fault.where for fault in found][:3] == ["train.jsonl line 21", "train.jsonl line 22", "train.jsonl line 22"]
