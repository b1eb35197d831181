"""Importing large libraries in a process of ours: garbage is looked for before and after, never meanwhile."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from tunewright import find, importing
from tunewright.contracts import Method


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of many modules that remembers whether the collector was on."""
    lines = [f"import many_{i}" for i in range(importing.MANY)]
    for i in range(importing.MANY):
        (tmp_path / f"many_{i}.py").touch()
    (tmp_path / "large_library.py").write_text("\n".join(["import gc", "collecting = gc.isenabled()", *lines]))
    (tmp_path / "small_library.py").write_text("import gc\ncollecting = gc.isenabled()\n")
    (tmp_path / "broken_library.py").write_text("raise ImportError('it is broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importing, "_ours", True)
    yield
    gc.unfreeze()
    for name in [n for n in sys.modules if n.startswith("many_") or n in ("large_library", "small_library")]:
        del sys.modules[name]


@pytest.mark.usefixtures("library")
def test_a_large_library_is_put_aside_and_collecting_goes_on():
    before = gc.get_freeze_count()
    importing.bring("large_library")
    assert not sys.modules["large_library"].collecting
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


@pytest.mark.usefixtures("library")
def test_where_nothing_large_came_in_everything_stays_collectable():
    before = gc.get_freeze_count()
    importing.bring("small_library")
    importing.bring("small_library")
    assert gc.get_freeze_count() == before
    assert gc.isenabled()


@pytest.mark.usefixtures("library")
def test_a_library_that_cannot_be_imported_says_so_and_collecting_goes_on():
    with pytest.raises(ImportError, match="it is broken"):
        importing.bring("broken_library")
    assert gc.isenabled()


@pytest.mark.usefixtures("library")
def test_in_somebody_elses_process_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(importing, "_ours", False)
    before = gc.get_freeze_count()
    importing.bring("large_library")
    assert sys.modules["large_library"].collecting
    assert gc.get_freeze_count() == before


def test_only_the_command_takes_the_process_for_its_own():
    program = "import tunewright.cli, tunewright.importing as i; {}; print(i._ours)"
    for call, ours in (("tunewright.cli.main(['tasks'])", "False"), ("tunewright.cli.main()", "True")):
        done = subprocess.run([sys.executable, "-c", program.format(call)], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == ours


def test_what_methods_name_can_be_imported():
    named = {name: find.find("methods", name, Method).imports for name in find.names("methods")}
    assert len(named) >= 8
    assert named["lora"] == ("peft",)
    assert set().union(*named.values()) == {"peft"}
