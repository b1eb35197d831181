"""The floors: imports only go down, wings never meet, siblings never meet; imports inside functions count."""

from __future__ import annotations

import ast
from pathlib import Path

HOME = Path(__file__).parents[1] / "src" / "tunewright"
FLOORS = [
    ("errors", "find", "importing", "version"),
    ("contracts", "recipe", "recipe_text", "rundir"),
    ("data", "models", "metrics"),
    ("tasks", "methods"),
    ("engine",),
    ("runs",),
    ("uses",),
    ("cli", "__main__", ""),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WINGS = ("tasks", "methods")
# floor 2: who may use whom beside them; a cycle here would be a knot
BESIDE = {("find", "errors"), ("contracts", "recipe"), ("rundir", "recipe"), ("recipe", "recipe_text")}


def modules() -> list[Path]:
    return sorted(HOME.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every tunewright module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from tunewright import find` is about the room, not about the door it stands behind
            found |= {node.module or ""} - {"tunewright"} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "tunewright" or name.startswith("tunewright.")}


def room(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else ""


def own_room(path: Path) -> str:
    first = path.relative_to(HOME).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def test_every_module_lives_in_a_known_room():
    assert len(modules()) >= 40
    assert {own_room(path) for path in modules()} <= set(FLOOR)


def test_imports_only_go_down():
    seen = 0
    for path in modules():
        here = own_room(path)
        for name in imports(path):
            there = room(name)
            seen += 1
            lower = FLOOR[there] < FLOOR[here]
            same_room = there == here or FLOOR[there] == FLOOR[here] == len(FLOORS) - 1
            assert lower or same_room or (here, there) in BESIDE, f"{path.relative_to(HOME)} imports {name}"
    assert seen >= 100


def test_wings_and_siblings_never_meet():
    files = [p for p in modules() if own_room(p) in WINGS and p.stem != "__init__"]
    assert len(files) >= 5
    for path in files:
        for name in imports(path):
            assert room(name) not in WINGS, f"{path.relative_to(HOME)} imports {name}"


def test_only_fit_calls_backward():
    callers = [p.name for p in modules() if ".backward()" in p.read_text(encoding="utf-8")]
    assert callers == ["fit.py"]


def test_the_engine_names_no_task_and_no_method():
    words = {p.stem for p in modules() if own_room(p) in WINGS and p.stem != "__init__"}
    engine = [p for p in modules() if own_room(p) == "engine"]
    assert len(engine) >= 8
    for path in engine:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.replace("-", "_") not in words, f"{path.name} names {node.value}"


def test_files_say_what_they_are():
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
            f"{path.relative_to(HOME)} has no docstring"
        )
