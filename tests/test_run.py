"""A run from recipe to folder: what it leaves opens without us, can be moved, asked, judged and compared, and is
never written over by mistake. Tiny models; every trained run is shared by the tests that only look at it.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_tree, write_image_rows, write_text_rows

import tunewright
from tunewright.errors import DataError, ModelError, RecipeError, RunError, TrainError, UserError
from tunewright.recipe import Recipe
from tunewright.rundir import RunDir

ANSWERS = {"better", "worse", "no meaningful change", "can't tell", "trade", "no verdict"}
QUICK = {"num_train_epochs": 6, "learning_rate": 5e-3, "precision": "float32"}
SHAPES = {
    "full": ("text-classification", "full"),
    "head": ("text-classification", "head"),
    "lora": ("text-classification", "lora"),
    "image-full": ("image-classification", "full"),
    "image-lora": ("image-classification", "lora"),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """Bases and rows of both kinds, for this file alone: its tests move them about (copies of them)."""
    folder = tmp_path_factory.mktemp("house")
    for task in ("text-classification", "image-classification"):
        tiny_tree(task, folder / task)
    return folder


def tree(house: Path, name: str, **keys: Any) -> dict[str, Any]:
    task, method = SHAPES[name]
    return tiny_tree(task, house / task, method=method, train=QUICK, **keys)


@pytest.fixture(scope="module")
def runs(house) -> dict[str, Path]:
    made = {}
    for name in SHAPES:
        made[name] = house / "runs" / name
        tunewright.train(tree(house, name, output_dir=str(made[name])), quiet=True)
    return made


@pytest.fixture
def lora_and_base(runs, house, tmp_path) -> tuple[Path, Path]:
    """A copy of the lora run, and of its base, which it names."""
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(runs["lora"], run)
    shutil.copytree(house / "text-classification" / "base", base)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(house / "text-classification" / "base"), str(base)))
    return run, base


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out(run: Path, house: Path) -> list[tuple[dict[str, Any], str]]:
    """(line of predictions.jsonl, the input that row id stands for), read from the user's files by hand."""
    found = []
    for line in lines(run / "predictions.jsonl"):
        if "image" in run.name:
            found.append((line, str(house / "image-classification" / "rows" / line["row"])))
            continue
        file, _, number = line["row"].rpartition(":")
        text = (house / "text-classification" / file).read_text().splitlines()[int(number) - 1]
        found.append((line, next(csv.reader([text]))[0]))
    return found


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# -------------------------------------------------- what leaves opens without us
ALONE = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tunewright":
            raise ImportError("tunewright is not here")

sys.meta_path.insert(0, Blocker())
import torch, transformers
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
answers = {}
for folder, inputs in json.loads(sys.stdin.read()).items():
    os.chdir(folder)
    usage = json.load(open("usage.json"))
    there = {}
    exec("\\n".join(usage["load"]), there)
    model, processor = there["model"].eval(), there["processor"]
    found = []
    for given in inputs:
        if "image" in usage["pipeline"]:
            from PIL import Image
            batch = processor(images=Image.open(given).convert("RGB"), return_tensors="pt")
        else:
            batch = processor(given, return_tensors="pt")
        with torch.inference_mode():
            found.append(torch.softmax(model(**batch).logits[0], dim=-1).tolist())
    piped = None
    if usage["library"] == "transformers":
        pipe = transformers.pipeline(usage["pipeline"], model="model")
        piped = [one[0] if isinstance(one, list) else one for one in (pipe(given) for given in inputs)]
    answers[folder] = {"scores": found, "labels": model.config.id2label, "pipeline": piped}
assert "tunewright" not in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def alone(runs, house) -> dict[str, dict[str, Any]]:
    """What transformers and peft answer by themselves, in a process that cannot import tunewright."""
    wanted = {str(run): [given for _, given in held_out(run, house)] for run in runs.values()}
    words = [sys.executable, "-c", ALONE]
    done = subprocess.run(words, input=json.dumps(wanted), capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return {name: answers[str(run)] for name, run in runs.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_c43_the_lines_of_usage_json_give_the_same_predictions_without_us(alone, runs, house, name):
    rows = held_out(runs[name], house)
    assert len(rows) == 18
    usage = json.loads((runs[name] / "usage.json").read_text())
    labels = {int(key): value for key, value in alone[name]["labels"].items()}
    assert labels == dict(enumerate(usage["labels"]))
    assert set(labels.values()) == ({"red", "blue"} if "image" in name else {"good", "bad"})
    for (line, _), scores in zip(rows, alone[name]["scores"], strict=True):
        theirs = {labels[i]: score for i, score in enumerate(scores)}
        assert theirs == pytest.approx(line["tuned"]["scores"], abs=1e-5)


@pytest.mark.parametrize("name", ["full", "head", "image-full"])
def test_pipeline_opens_a_run_that_stands_alone(alone, runs, house, name):
    for (line, _), theirs in zip(held_out(runs[name], house), alone[name]["pipeline"], strict=True):
        assert theirs["label"] == line["tuned"]["label"]
        assert theirs["score"] == pytest.approx(line["tuned"]["score"], abs=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_the_result_is_safetensors_and_json_and_names_its_base(runs, name):
    model = runs[name] / "model"
    files = {p.suffix for p in model.iterdir()}
    assert files <= {".json", ".safetensors", ".txt"}
    origin = json.loads((model / "base.json").read_text())
    assert len(origin["sha256"]) == 64
    assert Path(origin["checkpoint"]).is_dir()
    assert (model / "adapter_config.json").is_file() == ("lora" in name)


# -------------------------------------------------------------------- moving
@pytest.mark.parametrize("name", ["full", "head", "lora", "image-lora"])
def test_a_moved_run_answers_as_before(cli, runs, house, tmp_path, name):
    given = held_out(runs[name], house)[0][1]
    before = cli("predict", runs[name], given, "--json")
    shutil.copytree(runs[name], tmp_path / "copy")
    shutil.move(tmp_path / "copy", tmp_path / "else where" / "moved")
    assert cli("predict", tmp_path / "else where" / "moved", given, "--json") == before
    assert before[0] == 0


def test_a_run_that_stands_alone_needs_no_base(cli, house, tmp_path):
    shutil.copytree(house / "text-classification" / "base", tmp_path / "base")
    run = tunewright.train(
        tree(house, "head", output_dir=tmp_path / "run") | {"model": str(tmp_path / "base")}, quiet=True
    )
    shutil.rmtree(tmp_path / "base")
    assert cli("predict", run.path, "sun good")[0] == 0


def test_an_adapter_whose_base_moved_says_what_to_do_and_works_with_it(cli, lora_and_base, tmp_path):
    run, base = lora_and_base
    before = cli("predict", run, "sun good", "--json")
    shutil.move(base, tmp_path / "archive")
    code, out, err = cli("predict", run, "sun good")
    assert (code, out) == (2, "")
    assert str(base) in err
    assert "--base FOLDER" in err
    assert cli("predict", run, "sun good", "--json", "--base", tmp_path / "archive") == before
    assert before[0] == 0


def test_c42_another_base_of_the_same_shape_is_refused_by_its_sha_256(cli, lora_and_base, tmp_path):
    from safetensors.torch import load_file, save_file

    run, base = lora_and_base
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    name = next(n for n in tensors if n.endswith("weight"))
    save_file({**tensors, name: tensors[name] + 1e-3}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    code, out, err = cli("predict", run, "sun good", "--base", tmp_path / "other")
    assert (code, out) == (2, "")
    trained_on = json.loads((run / "model" / "base.json").read_text())["sha256"]
    assert trained_on[:12] in err
    assert "SHA-256" in err
    assert "--base FOLDER" in err


@pytest.mark.parametrize("name", ["lora", "full"])
def test_evaluate_with_a_moved_base_says_what_to_do_and_works_with_it(cli, runs, house, tmp_path, name):
    base = house / "text-classification" / "base"
    run, rows = tmp_path / "run", write_text_rows(tmp_path / "rows.csv", 20, seed=7)
    shutil.copytree(runs[name], run)
    before = cli("evaluate", run, rows, "--json")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(base), str(tmp_path / "gone")))
    code, _, err = cli("evaluate", run, rows)
    assert code == 2
    assert "--base FOLDER" in err
    assert cli("evaluate", run, rows, "--json", "--base", base) == before
    assert before[0] == 0


# ------------------------------------------------------------- the same command again
@pytest.fixture
def recipe_file(house, tmp_path) -> Path:
    path = tmp_path / "tickets.yaml"
    path.write_text(yaml.safe_dump(tree(house, "head", output_dir=str(tmp_path / "run"))))
    return path


def test_the_same_command_leaves_a_finished_run_alone(cli, recipe_file, tmp_path):
    code, out, _ = cli("train", recipe_file)
    assert (code, out) == (0, f"{tmp_path / 'run'}\n")
    before = stamps(tmp_path / "run")
    code, out, err = cli("train", recipe_file)
    assert (code, out) == (0, f"{tmp_path / 'run'}\n")
    assert "finished and left as it is" in err
    assert "--again" in err
    assert stamps(tmp_path / "run") == before


def test_again_trains_in_a_fresh_folder_and_gets_the_same_answers(cli, recipe_file, tmp_path):
    cli("train", recipe_file)
    before = stamps(tmp_path / "run")
    for number in (2, 3):
        code, out, _ = cli("train", recipe_file, "--again")
        assert (code, out) == (0, f"{tmp_path / f'run-{number}'}\n")
        once, twice = (tmp_path / name / "predictions.jsonl" for name in ("run", f"run-{number}"))
        assert once.read_bytes() == twice.read_bytes()
    assert stamps(tmp_path / "run") == before


def test_c51_another_recipe_in_the_same_folder_is_refused_with_the_keys_that_differ(cli, recipe_file, tmp_path):
    cli("train", recipe_file)
    before = stamps(tmp_path / "run")
    code, _, err = cli("train", recipe_file, "train.learning_rate=1e-4", "seed=4")
    assert code == 2
    assert "train.learning_rate: 0.005 there, 0.0001 now" in err
    assert "seed: 0 there, 4 now" in err
    assert "--again" in err
    assert stamps(tmp_path / "run") == before


def test_the_same_recipe_spelt_otherwise_is_the_same(cli, recipe_file, tmp_path):
    cli("train", recipe_file)
    code, _, err = cli("train", recipe_file, "train.weight_decay=0", "epochs=6.0", "data.on_bad_row=stop")
    assert code == 0, err
    assert "left as it is" in err


@pytest.mark.parametrize("finished", [True, False])
def test_rows_that_changed_since_are_not_passed_off_as_the_old_run(cli, house, tmp_path, monkeypatch, finished):
    """The digest holds the file's name and not its content."""
    rows = write_text_rows(tmp_path / "rows.csv", 60)
    given = tree(house, "full", output_dir=str(tmp_path / "run")) | {"data": {"train": str(rows), "holdout": 0.3}}
    if not finished:
        from tunewright.runs import training

        monkeypatch.setattr(training, "_save_model", lambda *a: (_ for _ in ()).throw(TrainError("cut short")))
        with pytest.raises(TrainError):
            tunewright.train(given, quiet=True)
        monkeypatch.undo()
    else:
        tunewright.train(given, quiet=True)
    with rows.open("a") as file:
        file.write("one more good day,good\n")
    with pytest.raises(RunError, match=r"other data: rows\.csv"):
        tunewright.train(given, quiet=True)


def test_another_base_of_the_same_name_does_not_continue_a_run(house, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    from tunewright.runs import training

    for name in ("a", "b"):
        shutil.copytree(house / "text-classification" / "base", tmp_path / name / "base")
    weights = tmp_path / "b" / "base" / "model.safetensors"
    save_file({n: t + 1e-3 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    given = tree(house, "lora", output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(training, "_save_model", lambda *a: (_ for _ in ()).throw(TrainError("cut short")))
    with pytest.raises(TrainError, match="cut short"):
        tunewright.train(given | {"model": str(tmp_path / "a" / "base")}, quiet=True)
    monkeypatch.undo()
    with pytest.raises(RunError, match="another base"):
        tunewright.train(given | {"model": str(tmp_path / "b" / "base")}, quiet=True)
    assert tunewright.train(given | {"model": str(tmp_path / "a" / "base")}, quiet=True).verdict


# -------------------------------------------------------------- folders that are not ours
def test_a_folder_with_other_files_is_refused_and_left_alone(cli, recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.docx").write_text("three years of work")
    code, _, err = cli("train", recipe_file)
    assert code == 2
    assert "files that are no run" in err
    assert "output_dir" in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.docx"]


def test_a_recipe_of_the_users_own_is_never_written_over(cli, house, tmp_path, monkeypatch):
    """recipe.yaml with `output_dir: .` beside other work."""
    own = yaml.safe_dump(tree(house, "head", output_dir=".")) + "# my notes\n"
    (tmp_path / "recipe.yaml").write_text(own)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("train", "recipe.yaml")
    assert code == 2
    assert "files that are no run" in err
    assert (tmp_path / "recipe.yaml").read_text() == own
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_folder_is_fine_and_a_file_is_not(cli, recipe_file, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert "a file stands where the run folder should be" in cli("train", recipe_file)[2]
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    assert cli("train", recipe_file)[0] == 0


def test_a_second_process_on_a_folder_in_use_is_refused(cli, recipe_file, tmp_path):
    recipe, _ = Recipe.read(recipe_file)
    run = RunDir.create(tmp_path / "run", recipe)
    program = f"""
import sys
from pathlib import Path
from tunewright.rundir import RunDir
with RunDir(Path({str(run.path)!r})).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        code, _, err = cli("train", recipe_file)
        assert code == 2
        assert f"in use by process {holder.pid}" in err
        holder.kill()  # the lock is the kernel's: a killed process leaves none behind
    assert cli("train", recipe_file)[0] == 0


@pytest.mark.parametrize("verb", ["evaluate", "report", "predict"])
def test_a_folder_that_is_no_run_is_refused_with_those_beside_it(cli, runs, verb):
    words = [verb, runs["full"].parent / "fulll", *(["text"] if verb == "predict" else [])]
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert "not a run folder" in err
    assert "image-full" in err


def test_an_unfinished_run_says_so(cli, house, tmp_path):
    RunDir.create(tmp_path / "run", Recipe.of(tree(house, "head"))[0])
    for words in (["predict", tmp_path / "run", "sun"], ["evaluate", tmp_path / "run"]):
        code, _, err = cli(*words)
        assert code == 2
        assert "not finished" in err
    assert "not finished" in cli("compare", tmp_path / "run", tmp_path / "run")[2]


# --------------------------------------------------------------------- predict
def test_one_text_is_answered(cli, runs):
    code, out, _ = cli("predict", runs["full"], "sun good day", "--json")
    assert code == 0
    (answer,) = json.loads(out)
    assert set(answer) == {"row", "label", "score", "scores"}
    assert answer["label"] == max(answer["scores"], key=answer["scores"].get)
    assert answer["score"] == answer["scores"][answer["label"]]
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-6)
    assert cli("predict", runs["full"], "sun good day")[1] == f"1\t{answer['label']}\t{answer['score']:.3f}\n"


def test_a_csv_comes_back_with_its_rows_and_columns_and_two_more(cli, runs, tmp_path):
    given = [
        {"id": "007", "text": "sun, good day", "note": 'she said "no"'},
        {"id": "1e5", "text": "rain bad\nnight", "note": "=1+1"},
        {"id": "NA", "text": "sun good day", "note": ""},
        {"id": "", "text": "sun, good day", "note": "ünï ☃"},
    ]
    with (tmp_path / "new.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(given[0]))
        writer.writeheader()
        writer.writerows(given)
    before = (tmp_path / "new.csv").read_bytes()
    code, out, err = cli("predict", runs["full"], tmp_path / "new.csv")
    assert (code, out) == (0, "")
    assert f"4 rows with answers: {tmp_path / 'new.predicted.csv'}" in err
    with (tmp_path / "new.predicted.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["id", "text", "note", "predicted_label", "predicted_score"]
    assert [{k: row[k] for k in given[0]} for row in found] == given
    assert {row["predicted_label"] for row in found} <= {"good", "bad"}
    assert all(0.5 <= float(row["predicted_score"]) <= 1 for row in found)
    assert found[0]["predicted_score"] == found[3]["predicted_score"]
    assert (tmp_path / "new.csv").read_bytes() == before


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_of_json_lines_are_answered_and_may_differ_in_their_keys(cli, runs, tmp_path, suffix):
    rows = [{"text": "sun good"}, {"text": "rain bad", "more": [1, 2]}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = json.loads(cli("predict", runs["full"], tmp_path / "new.jsonl", "--json")[1])
    assert [a["row"] for a in answers] == ["new.jsonl:1", "new.jsonl:2"]
    assert not list(tmp_path.glob("*predicted*"))
    assert cli("predict", runs["full"], tmp_path / "new.jsonl", "-o", tmp_path / f"out{suffix}")[0] == 0
    if suffix == ".jsonl":
        found = lines(tmp_path / "out.jsonl")
        assert [{k: v for k, v in line.items() if not k.startswith("predicted_")} for line in found] == rows
    else:
        with (tmp_path / "out.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        assert list(found[0]) == ["text", "predicted_label", "predicted_score", "more"]
    assert [line["predicted_label"] for line in found] == [a["label"] for a in answers]


def test_what_was_guessed_while_reading_is_said(cli, runs, tmp_path):
    (tmp_path / "new.csv").write_text("id;message\n1;sun good\n2;rain bad\n")
    code, _, err = cli("predict", runs["full"], tmp_path / "new.csv")
    assert code == 0
    assert 'column "message" is read as text' in err
    assert 'separated by ";"' in err


def test_the_columns_of_the_recipe_are_used_again(cli, house, tmp_path):
    rows = write_text_rows(tmp_path / "rows.csv", 60)
    rows.write_text(rows.read_text().replace("text,label", "body,topic"))
    data = {"train": str(rows), "columns": {"text": "body", "label": "topic"}, "holdout": 0.3}
    run = tunewright.train(tree(house, "head", output_dir=tmp_path / "run") | {"data": data}, quiet=True)
    (tmp_path / "new.csv").write_text("text,body\nnot this one,sun good\n")
    assert cli("predict", run.path, tmp_path / "new.csv")[0] == 0
    assert cli("evaluate", run.path, rows)[0] == 0
    alone = run.predict("sun good")[0]["score"]
    with (tmp_path / "new.predicted.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["predicted_score"]) == pytest.approx(alone, abs=1e-6)


def test_pictures_one_by_one_and_by_the_folder(cli, runs, house, tmp_path):
    folder = write_image_rows(tmp_path / "photos", 6, seed=3)
    (folder / "red" / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    answers = json.loads(cli("predict", runs["image-full"], folder, "--json")[1])
    assert [a["row"] for a in answers] == sorted(f"{n}/{i}.png" for i in range(6) for n in [["blue", "red"][i % 2]])
    one = json.loads(cli("predict", runs["image-full"], folder / "red" / "1.png", "--json")[1])
    assert one[0]["row"] == str(folder / "red" / "1.png")
    assert one[0]["scores"] == pytest.approx(next(a for a in answers if a["row"] == "red/1.png")["scores"], abs=1e-6)
    (tmp_path / "list.csv").write_text("image\nphotos/red/1.png\n")
    table = json.loads(cli("predict", runs["image-full"], tmp_path / "list.csv", "--json")[1])
    assert table[0]["scores"] == pytest.approx(one[0]["scores"], abs=1e-6)


@pytest.fixture
def bad_inputs(tmp_path) -> dict[str, str]:
    """Name -> what a stranger hands over; pictures and texts that nobody can answer."""
    folder = write_image_rows(tmp_path / "photos", 2)
    (folder / "red" / "2.png").write_bytes(b"\x89PNG cut off")
    (tmp_path / "empty").mkdir()
    (tmp_path / "letter.txt").write_text("good sun")
    (tmp_path / "blank.csv").write_text("text,id\nsun,1\n ,2\n")
    (tmp_path / "other.csv").write_text("txt,id\nsun,1\n")
    (tmp_path / "nothing.csv").write_text("")
    (tmp_path / "header.csv").write_text("text\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "sun"\n')
    (tmp_path / "new.csv").write_text("text\nsun\n")
    return {name: str(tmp_path / name) for name in (p.name for p in tmp_path.iterdir())}


@pytest.mark.parametrize(
    ("run", "given", "said"),
    [
        ("full", "nwe.csv", ["nwe.csv: no such file", 'Did you mean "new.csv"?']),
        ("full", "blank.csv", ["blank.csv line 3", 'field "text"', "empty"]),
        ("full", "other.csv", ["other.csv", 'Did you mean "txt"?', "data.columns.text=txt"]),
        ("full", "nothing.csv", ["nothing.csv", "0 bytes"]),
        ("full", "header.csv", ["header.csv", "no rows"]),
        ("full", "broken.jsonl", ["broken.jsonl line 1", "no valid JSON"]),
        ("full", "letter.txt", ["letter.txt", "this is a path", "CSV or JSONL"]),
        ("full", "photos", ["photos", "answers texts"]),
        ("full", "", ['field "text"', "empty"]),
        ("full", "  \n", ['field "text"', "empty"]),
        ("full", "\udcff sun", ['field "text"', "surrogate"]),
        ("image-full", "photos/red/9.png", ["9.png", 'field "image"', "no such image"]),
        ("image-full", "photos/red/2.png", ["2.png", "no image"]),
        ("image-full", "photos", ["red/2.png", "no image"]),
        ("image-full", "letter.txt", ["letter.txt", "no image"]),
        ("image-full", "empty", ["no pictures in this folder", "photo.jpg"]),
        ("image-full", "", ["no such image"]),
        ("image-full", "a text " * 200, ['field "image"']),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_model_is_opened(
    cli, runs, bad_inputs, tmp_path, monkeypatch, run, given, said
):
    from tunewright.runs import answering

    monkeypatch.setattr(answering, "open_run", lambda *a: pytest.fail("the model was opened"))
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("predict", runs[run], given)
    assert (code, out) == (2, "")
    assert not [part for part in said if part not in err], err


def test_a_long_text_is_a_text_and_no_path(cli, runs):
    assert cli("predict", runs["full"], "sun good day " * 100)[0] == 0


def test_answers_go_nowhere_but_where_they_can(cli, runs, tmp_path):
    (tmp_path / "new.csv").write_text("text\nsun\n")
    code, _, err = cli("predict", runs["full"], tmp_path / "new.csv", "-o", tmp_path / "no" / "out.csv")
    assert code == 2
    assert "no such folder" in err


# -------------------------------------------------------------------- evaluate
def test_evaluate_shows_what_the_run_measured(cli, runs):
    evidence = json.loads((runs["full"] / "evidence.json").read_text())
    assert json.loads(cli("evaluate", runs["full"], "--json")[1]) == evidence
    text = cli("evaluate", runs["full"])[1]
    assert evidence["verdict"]["sentence"] in text
    assert all(measure["name"] in text for measure in evidence["measures"])


def test_evaluate_another_file_gives_evidence_of_the_same_shape(cli, runs, tmp_path):
    rows = write_text_rows(tmp_path / "rows.csv", 40, seed=77)
    code, out, _ = cli("evaluate", runs["full"], rows, "--json")
    assert code == 0
    evidence = json.loads(out)
    check_evidence(evidence, n=40)
    assert evidence["verdict"]["answer"] in ANSWERS - {"no verdict"}
    own = json.loads((runs["full"] / "evidence.json").read_text())
    assert evidence["baseline"] == own["baseline"]


def test_evaluate_on_the_held_out_rows_gives_the_runs_own_numbers(cli, runs, house, tmp_path):
    rows = held_out(runs["lora"], house)
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, line["truth"]) for line, text in rows)])
    evidence = json.loads(cli("evaluate", runs["lora"], tmp_path / "test.csv", "--json")[1])
    own = json.loads((runs["lora"] / "evidence.json").read_text())
    for ours, theirs in zip(evidence["measures"], own["measures"], strict=True):
        assert ours["base"] == pytest.approx(theirs["base"], abs=1e-6)
        assert ours["tuned"] == pytest.approx(theirs["tuned"], abs=1e-6)
    assert evidence["verdict"]["answer"] == own["verdict"]["answer"]


def test_rows_that_were_trained_on_give_no_verdict(cli, runs, house):
    rows = house / "text-classification" / "rows.csv"
    evidence = json.loads(cli("evaluate", runs["full"], rows, "--json")[1])
    assert evidence["verdict"]["answer"] == "no verdict"
    assert "42 test rows also stand in the training data" in evidence["verdict"]["sentence"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\nsun x,good\nrain x,bda\n", ["rows.csv line 3", "'bda'", "bad, good", 'Did you mean "bad"?']),
        ("text,id\nsun x,1\n", ['field "label"', "no column is the label"]),
        ("text,label\nsun x,\n", ["rows.csv line 2", "label is empty"]),
        ("", ["rows.csv", "0 bytes"]),
        ("text,label\n", ["no rows"]),
    ],
)
def test_a_file_that_cannot_be_evaluated_is_refused(cli, runs, tmp_path, text, said):
    (tmp_path / "rows.csv").write_text(text)
    code, out, err = cli("evaluate", runs["full"], tmp_path / "rows.csv")
    assert (code, out) == (2, "")
    assert not [part for part in said if part not in err], err


def test_a_missing_file_to_evaluate_is_named(cli, runs, tmp_path):
    (tmp_path / "rows.csv").write_text("")
    code, _, err = cli("evaluate", runs["full"], tmp_path / "rosw.csv")
    assert code == 2
    assert 'Did you mean "rows.csv"?' in err


# --------------------------------------------------------------------- compare
def test_compare_sets_runs_side_by_side(cli, runs):
    code, out, _ = cli("compare", runs["full"], runs["head"], runs["lora"], "--json")
    assert code == 0
    table = json.loads(out)
    assert (table["metric"], table["n"]) == ("accuracy", 18)
    assert [line["run"] for line in table["runs"]] == ["full", "head", "lora"]
    scores = {name: {r["row"]: r["tuned"]["label"] == r["truth"] for r in lines(runs[name] / "predictions.jsonl")}
              for name in ("full", "head", "lora")}  # fmt: skip
    for line in table["runs"]:
        own = sum(scores[line["run"]].values()) / 18
        assert line["tuned"] == pytest.approx(own)
        assert line["against_first"] == pytest.approx(own - sum(scores["full"].values()) / 18)
        low, high = line["against_first_ci95"]
        assert low <= line["against_first"] <= high
    text = cli("compare", runs["full"], runs["head"], runs["lora"])[1]
    assert "accuracy on the same 18 held-out rows" in text
    assert "head against full" in text


def test_compare_refuses_one_run_and_runs_without_the_same_rows(cli, runs, house, tmp_path):
    code, _, err = cli("compare", runs["full"])
    assert code == 2
    assert "one run cannot be compared" in err
    tunewright.train(tree(house, "head", output_dir=tmp_path / "seed", seed=3), quiet=True)
    code, _, err = cli("compare", runs["full"], tmp_path / "seed")
    assert code == 2
    assert "test rows with full" in err
    assert "holdout and seed" in err
    assert cli("compare", runs["full"], runs["image-full"])[0] == 2


def test_compare_is_not_fooled_by_files_of_one_name(cli, runs, house, tmp_path):
    """rows.csv:7 of another file is another row, though the ids agree."""
    rows = write_text_rows(tmp_path / "rows.csv", 60, seed=99)
    given = tree(house, "head", output_dir=tmp_path / "run") | {"data": {"train": str(rows), "holdout": 0.3}}
    tunewright.train(given, quiet=True)
    ids = [{line["row"] for line in lines(run / "predictions.jsonl")} for run in (runs["head"], tmp_path / "run")]
    assert ids[0] == ids[1]
    code, _, err = cli("compare", runs["head"], tmp_path / "run")
    assert code == 2
    assert "another file" in err


# -------------------------------------------------------------------- evidence
def check_evidence(evidence: dict[str, Any], n: int) -> None:
    """evidence.json as DESIGN, section 5 promises it."""
    verdict = evidence["verdict"]
    assert verdict["answer"] in ANSWERS
    assert verdict["sentence"].endswith(".")
    assert verdict["margin"] == 0.02
    assert all(isinstance(text, str) for text in verdict["not_measured"])
    assert ("smallest_detectable" in verdict) == (verdict["answer"] != "no verdict")
    assert {measure["name"] for measure in evidence["measures"]} == {"accuracy", "macro_f1", "log_loss"}
    for measure in evidence["measures"]:
        assert measure["about"] in {"task", "general", "robustness", "group", "calibration", "drift"}
        assert measure["n"] == n
        assert measure["difference"] == pytest.approx(measure["tuned"] - measure["base"])
        low, high = measure["ci95"]
        assert low <= measure["difference"] <= high
        assert 0 <= measure["p"] <= 1
        assert measure["higher_is_better"] is (measure["name"] != "log_loss")
        assert measure["baseline"]
    flips = evidence["flips"]
    assert sum(flips[kind] for kind in ("fixed", "broken", "kept_right", "still_wrong")) == n
    assert len(flips["examples"]) == min(600, flips["fixed"] + flips["broken"])
    assert flips["changed"] + flips["same_wrong"] >= flips["still_wrong"]
    for example in flips["examples"]:
        assert {"row", "kind", "input", "truth", "base", "tuned"} <= set(example)
        right = example["truth"] == (example["tuned"] if example["kind"] == "fixed" else example["base"])
        assert right
    assert math.isclose(evidence["measures"][0]["difference"], (flips["fixed"] - flips["broken"]) / n, abs_tol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
def test_evidence_has_the_shape_of_the_design(runs, name):
    evidence = json.loads((runs[name] / "evidence.json").read_text())
    check_evidence(evidence, n=18)
    cost = evidence["cost"]
    assert 0 < cost["trainable_parameters"] <= cost["total_parameters"]
    assert (cost["trainable_parameters"] == cost["total_parameters"]) == ("full" in name)
    assert cost["train_seconds"] > 0
    assert cost["peak_memory_bytes"] > 0
    assert not [key for key, value in cost.items() if value is None]


@pytest.mark.parametrize("name", SHAPES)
def test_evidence_follows_from_the_predictions(runs, name):
    rows = lines(runs[name] / "predictions.jsonl")
    evidence = json.loads((runs[name] / "evidence.json").read_text())
    measures = {measure["name"]: measure for measure in evidence["measures"]}
    for side in ("base", "tuned"):
        assert measures["accuracy"][side] == pytest.approx(
            sum(r[side]["label"] == r["truth"] for r in rows) / len(rows)
        )
        loss = sum(-math.log(max(r[side]["scores"][r["truth"]], 1e-12)) for r in rows) / len(rows)
        assert measures["log_loss"][side] == pytest.approx(loss)
    kinds = {(r["base"]["label"] == r["truth"], r["tuned"]["label"] == r["truth"], r["row"]) for r in rows}
    assert evidence["flips"]["fixed"] == sum(not before and after for before, after, _ in kinds)
    assert evidence["flips"]["broken"] == sum(before and not after for before, after, _ in kinds)


def test_scores_parquet_holds_every_row_and_metric(runs):
    import pyarrow.parquet as pq

    table = pq.read_table(runs["full"] / "scores.parquet").to_pylist()
    rows = {line["row"]: line for line in lines(runs["full"] / "predictions.jsonl")}
    assert {line["metric"] for line in table} == {"accuracy", "log_loss"}
    assert len(table) == 2 * len(rows)
    for line in table:
        if line["metric"] == "accuracy":
            assert line["tuned"] == float(rows[line["row"]]["tuned"]["label"] == rows[line["row"]]["truth"])
        assert line["split"] == "test"


@pytest.mark.parametrize("name", SHAPES)
def test_the_test_rows_stand_in_no_other_split(runs, house, name):
    data = json.loads((runs[name] / "data.json").read_text())
    tested = {line["row"] for line in lines(runs[name] / "predictions.jsonl")}
    assert tested == {row for row, split in data["split"].items() if split == "test"}
    assert len(data["split"]) == 60
    assert sum(split == "train" for split in data["split"].values()) == 60 - len(tested)


def test_no_content_stands_on_both_sides(house, tmp_path):
    """Copies, and copies that differ by blanks, stay together."""
    rows = [f"sun {i} day,good\nrain {i} night,bad\n" for i in range(20)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(rows) + "".join(rows).replace(" ", "  "))
    given = tree(house, "head", output_dir=tmp_path / "run") | {"data": {"train": str(tmp_path / "rows.csv")}}
    tunewright.train(given, quiet=True)
    text = (tmp_path / "rows.csv").read_text().splitlines()
    sides: dict[str, set[str]] = {}
    for row, split in json.loads((tmp_path / "run" / "data.json").read_text())["split"].items():
        content = " ".join(text[int(row.rpartition(":")[2]) - 1].split())
        sides.setdefault(content, set()).add(split)
    assert len(sides) == 40
    assert all(len(splits) == 1 for splits in sides.values())


def test_few_rows_give_no_verdict(house, tmp_path):
    data = {"train": str(house / "text-classification" / "rows.csv"), "holdout": 0.2}
    run = tunewright.train(tree(house, "head", output_dir=tmp_path / "run") | {"data": data}, quiet=True)
    assert run.evidence["verdict"]["answer"] == "no verdict"
    assert run.verdict == "No verdict: 12 held-out rows are fewer than 15."
    assert run.evidence["measures"][0]["n"] == 12


@pytest.mark.parametrize("method", ["head", "lora", "full"])
def test_labels_drawn_at_random_do_not_come_out_better(house, tmp_path, method):
    rng = random.Random(17)
    with (tmp_path / "rows.csv").open("w") as file:
        file.write("text,label\n")
        for _ in range(200):
            words = " ".join(rng.sample("abcdefghijklmnopqrstuvwxyz0123456789", 8))
            file.write(f"{words},{rng.choice(['good', 'bad'])}\n")
    data = {"train": str(tmp_path / "rows.csv"), "holdout": 0.3}
    train = QUICK | {"num_train_epochs": 3, "per_device_train_batch_size": 20}
    run = tunewright.train(
        tree(house, method, output_dir=tmp_path / "run") | {"data": data, "train": train}, quiet=True
    )
    assert run.evidence["measures"][0]["n"] == 60
    assert run.evidence["verdict"]["answer"] in ("can't tell", "no meaningful change", "worse")


# --------------------------------------------------------------------- failing
def test_a_loss_that_is_not_finite_leaves_error_txt_and_success_removes_it(cli, house, tmp_path, monkeypatch):
    from tunewright.tasks.text_classification import TextClassification

    path, run = tmp_path / "tickets.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tree(house, "full", output_dir=str(run))))
    right = TextClassification.loss

    def wrong(self, model, batch, loaded):
        loss = right(self, model, batch, loaded)
        return dataclasses.replace(loss, totals={k: v * torch.nan for k, v in loss.totals.items()})

    monkeypatch.setattr(TextClassification, "loss", wrong)
    code, out, _ = cli("train", path, "--json")
    assert code == 1
    (fault,) = json.loads(out)["faults"]
    assert fault["where"].startswith("step 1 of ")
    assert "rows.csv:" in fault["got"]
    assert "learning_rate" in fault["remedy"]
    text = (run / "error.txt").read_text()
    assert "not finite" in text
    assert "Traceback" not in text
    assert not RunDir(run).finished
    monkeypatch.undo()
    assert cli("train", path)[0] == 0
    assert not (run / "error.txt").exists()
    assert RunDir(run).finished


def test_a_crash_leaves_its_traceback_in_error_txt(house, tmp_path, monkeypatch):
    from tunewright.tasks.text_classification import TextClassification

    def crash(self, examples):
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(TextClassification, "collate", crash)
    with pytest.raises(ZeroDivisionError):
        tunewright.train(tree(house, "full", output_dir=tmp_path / "run"), quiet=True)
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()
    assert "in the middle" in (tmp_path / "run" / "error.txt").read_text()


# ------------------------------------------------------------------ the Python face
def test_train_and_ask_in_python(house, tmp_path, runs):
    run = tunewright.train(**tree(house, "full", output_dir=tmp_path / "run"), quiet=True)
    assert run.path == tmp_path / "run"
    assert run.verdict == run.evidence["verdict"]["sentence"]
    assert run.verdict == tunewright.Run(runs["full"]).verdict
    assert run.report.is_file()
    assert run.verdict in run._repr_html_().replace("&#x27;", "'")
    one, two = run.predict(["sun good day", "rain bad night"])
    assert [one["row"], two["row"]] == ["1", "2"]
    assert run.predict("sun good day")[0]["scores"] == pytest.approx(one["scores"], abs=1e-6)
    assert tunewright.load(run)([{"text": "sun good day", "row": "x"}])[0]["label"] == one["label"]
    recipe = (run.path / "recipe.yaml").read_text()
    assert "learning_rate: 0.005  # python" in recipe
    assert "weight_decay: 0.0  # default" in recipe


def test_a_recipe_may_be_a_file_a_mapping_or_an_object(house, tmp_path):
    given = tree(house, "head")
    (tmp_path / "tickets.yaml").write_text(yaml.safe_dump(given))
    digests = {
        tunewright.check(recipe, seed=4, train={"weight_decay": 0.1})["digest"]
        for recipe in (tmp_path / "tickets.yaml", str(tmp_path / "tickets.yaml"), given, Recipe.of(given)[0])
    }
    assert len(digests) == 1, "a nested key given besides must not throw the section's other keys away"
    assert digests != {tunewright.check(given)["digest"]}


def test_check_in_python(house):
    found = tunewright.check(tree(house, "lora"))
    assert found["ok"]
    assert found["rows"] == {"train": 42, "validation": 0, "test": 18}
    assert found["base"]["sha256"]
    json.dumps(found)


def test_compare_in_python_takes_runs_and_paths(runs):
    table = tunewright.compare(tunewright.Run(runs["full"]), runs["head"], str(runs["lora"]))
    assert [line["method"] for line in table["runs"]] == ["full", "head", "lora"]


def test_python_raises_all_faults_at_once(house, tmp_path):
    with pytest.raises(RecipeError) as caught:
        tunewright.train(tree(house, "full"), learning_rat=1, seed=-1)
    assert {fault.where for fault in caught.value.faults} == {"python: learning_rat", "python: seed"}
    for given, kind in (({"data": str(tmp_path / "no.csv")}, UserError), ({"model": str(tmp_path / "no")}, UserError)):
        with pytest.raises(kind, match="no"):
            tunewright.check(tree(house, "full") | given)
    with pytest.raises(DataError):
        tunewright.Run(house / "runs" / "full").predict("")
    with pytest.raises(RunError):
        tunewright.load(tmp_path)


def test_an_adapter_without_its_base_raises_in_python(lora_and_base):
    run, base = lora_and_base
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="--base"):
        tunewright.Run(run).predict("sun")
