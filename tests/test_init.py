"""`init`: a recipe that `check` accepts, from columns alone; every guess said, no file lost. And shell completion."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import write_conversation_rows, write_image_rows, write_text_rows

from tunewright import cli
from tunewright.cli import main
from tunewright.errors import DataError, RunError
from tunewright.models import tiny
from tunewright.recipe import Recipe
from tunewright.uses import starting
from tunewright.uses.completion import SHELLS, completion

BASES = {
    "text-classification": tiny.text_encoder,
    "image-classification": tiny.image_encoder,
    "sft": tiny.causal_lm,
    "causal-lm": tiny.causal_lm,
}


def write_documents(path: Path) -> Path:
    path.write_text("".join(f'{{"text": "the sun and rain of day {n}"}}\n' for n in range(40)), encoding="utf-8")
    return path


ROWS = {
    "text-classification": lambda where: write_text_rows(where / "rows.csv", 40),
    "image-classification": lambda where: write_image_rows(where / "rows", 40),
    "sft": lambda where: write_conversation_rows(where / "rows.jsonl", 40),
    "causal-lm": lambda where: write_documents(where / "rows.jsonl"),
}


@pytest.mark.parametrize("task", ROWS)
def test_the_task_is_guessed_and_check_accepts_the_recipe(tmp_path, capsys, task):
    rows, base = ROWS[task](tmp_path), tmp_path / "base"
    base.mkdir()
    BASES[task](base)
    out = tmp_path / "recipe.yaml"
    assert main(["init", str(rows), "--model", str(base), "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["faults"]) == (task, [])
    assert any(task in guess for guess in found["guesses"])
    assert yaml.safe_load(out.read_text())["data"]["train"] == rows.name
    assert main(["check", str(out), "--json"]) == 0


def test_a_label_of_any_name_is_found_and_said(tmp_path):
    rows = write_text_rows(tmp_path / "rows.csv", 40)
    rows.write_text(rows.read_text().replace("text,label", "text,mood"), encoding="utf-8")
    found = starting.start(str(rows), model="m/x", out=tmp_path / "r.yaml")
    assert found["task"] == "text-classification"
    assert any('"mood"' in guess for guess in found["guesses"])
    assert Recipe.read(tmp_path / "r.yaml")[0].data.columns == {"label": "mood"}


def test_a_file_is_never_written_over_unless_forced(tmp_path):
    rows, out = write_text_rows(tmp_path / "rows.csv", 40), tmp_path / "recipe.yaml"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="--force"):
        starting.start(str(rows), out=out)
    assert out.read_text() == "mine"
    starting.start(str(rows), model="m/x", out=out, force=True)
    assert "task: text-classification" in out.read_text()


def test_data_that_suits_no_task_says_why_for_each(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("x,y\n1,2\n3,4\n", encoding="utf-8")
    with pytest.raises(DataError, match="text-classification cannot be learned from this"):
        starting.start(str(rows), out=tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()
    assert main(["init", str(tmp_path / "nothing.csv"), "-o", str(tmp_path / "r.yaml")]) == 2


def test_what_check_would_say_is_said_at_once(tmp_path):
    rows = write_text_rows(tmp_path / "rows.csv", 40)
    found = starting.start(str(rows), model=str(tmp_path / "no-base"), out=tmp_path / "recipe.yaml")
    assert any("no such folder" in fault for fault in found["faults"])


def test_odd_names_stay_what_they_are(tmp_path):
    rows = write_text_rows(tmp_path / "a # b: c.csv", 40)
    rows.write_text(rows.read_text().replace("text,label", 'text,"mood: # of day"'), encoding="utf-8")
    starting.start(str(rows), model="m/x", out=tmp_path / "recipe.yaml")
    recipe = Recipe.read(tmp_path / "recipe.yaml")[0]
    assert recipe.data.train == str(rows)
    assert recipe.data.columns == {"label": "mood: # of day"}


# ------------------------------------------------------------------- completion
def test_every_verb_and_option_is_completed():
    parser, verbs = cli._parser()
    assert len(verbs) >= 13
    for shell in SHELLS:
        script = completion(parser, shell)
        for verb in verbs:
            assert verb in script
        assert "side-by-side" in script


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_can_read_its_script(tmp_path, capsys, shell):
    assert main(["completion", shell]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    subprocess.run([shell, "-n", str(path)], check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("comp", {"compare", "completion"}),
        ("train --ag", {"--again"}),
        ("completion z", {"zsh"}),
        ("check my.ya", set()),
    ],
)
def test_bash_completes(capsys, words, expected):
    main(["completion", "bash"])
    typed = ["tunewright", *words.split(" ")]
    ask = f"COMP_WORDS=({' '.join(typed)}); COMP_CWORD={len(typed) - 1}; _tunewright; echo ${{COMPREPLY[@]}}"
    script = capsys.readouterr().out + ask
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
