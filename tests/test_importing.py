"""Importing large libraries in a process of ours: garbage is looked for before and after, never meanwhile."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import subprocess
import sys

import pytest

from tunewright import find, importing
from tunewright.contracts import Method
from tunewright.recipe import Recipe
from tunewright.runs import checking


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


@pytest.mark.usefixtures("library")
def test_what_is_left_out_is_as_if_it_were_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "small_library", None)  # so that it is put back
    del sys.modules["small_library"]
    importing.leave_out("small_library")
    assert importlib.util.find_spec("small_library") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("small_library")


@pytest.mark.usefixtures("library")
def test_nothing_is_left_out_that_is_there_already_or_elsewhere(monkeypatch):
    importing.bring("small_library")
    importing.leave_out("small_library")
    assert sys.modules["small_library"] is not None
    monkeypatch.setattr(importing, "_ours", False)
    importing.leave_out("large_library")
    importing.bring("large_library")


@pytest.mark.parametrize(
    ("keys", "config", "left"),
    [
        ({}, {}, ["bitsandbytes"]),
        ({"model.quantize": "nf4"}, {}, []),
        ({"train.optim": "adamw_8bit"}, {}, []),
        ({}, {"quantization_config": {"load_in_4bit": True}}, []),
    ],
)
def test_bitsandbytes_is_left_out_where_nobody_can_come_to_need_it(tmp_path, monkeypatch, keys, config, left):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    (tmp_path / "model.safetensors").touch()
    found: list[str] = []
    monkeypatch.setattr(checking, "leave_out", found.append)
    words = [f"model.checkpoint={tmp_path}", "task=sft", "data=rows.csv", "method=lora"]
    recipe, _ = Recipe.from_keys([*words, *(f"{key}={value}" for key, value in keys.items())])
    checking._bring_libraries(recipe, find.build("methods", "lora", {}, Method))
    assert found == left


def test_a_lora_run_of_ours_brings_peft_and_no_compiler():
    """bitsandbytes would: what it decorates imports torch._inductor."""
    program = (
        "import sys; from tunewright.importing import *; own_process(); leave_out('bitsandbytes'); bring('peft');"
        "print('torch._inductor.compile_fx' in sys.modules, 'peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
