"""The catalogue of silent bugs holds: every entry is there, every test it names exists, the page says the same."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from silent_bugs import CATALOGUE, NOT_BUILT, table

HERE = Path(__file__).parent


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def numbers(test: str) -> list[int]:
    """test_c22_c23_there_are -> [22, 23]"""
    (found,) = re.findall(r"^test_((?:c\d\d_)*)", test)
    return [int(n) for n in re.findall(r"\d\d", found)]


def test_every_entry_is_accounted_for():
    assert sorted(CATALOGUE) == list(range(1, 71))
    without = {number for number, entry in CATALOGUE.items() if not entry.tests}
    assert without == {49, *range(58, 69)}
    assert all(CATALOGUE[n].stopped.startswith(NOT_BUILT) for n in without - {49})


def test_every_test_that_is_named_exists_and_each_entry_has_one_of_its_name():
    for number, entry in CATALOGUE.items():
        named = [name.split("::") for name in entry.tests]
        assert len(set(entry.tests)) == len(named)
        for file, function in named:
            assert function in functions_of(file), f"C{number}: {file} has no {function}"
        assert not named or any(number in numbers(function) for _, function in named), f"C{number}"


def test_every_test_with_an_entry_in_its_name_stands_in_the_map():
    seen = 0
    for file in sorted(HERE.glob("test_*.py")):
        for function in functions_of(file.name):
            for number in numbers(function):
                seen += 1
                assert f"{file.name}::{function}" in CATALOGUE[number].tests
    assert seen >= 60


def test_the_page_is_the_map():
    page = (HERE.parent / "docs" / "silent-bugs.md").read_text(encoding="utf-8")
    assert page.endswith(table()), "python tests/silent_bugs.py prints the table that belongs there"


def test_entries_are_sentences_and_not_too_long():
    for entry in CATALOGUE.values():
        assert 20 < len(entry.bug) < 120
        assert 10 < len(entry.stopped) < 130
        assert "|" not in entry.bug + entry.stopped
        assert not entry.bug.endswith(".")
