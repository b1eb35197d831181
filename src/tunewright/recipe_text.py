"""A recipe as text: YAML read with care, keys laid over it, and written back with where each value came from.

Knows nested mappings, files and places; not what a key means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tunewright.errors import Fault, RecipeError, nearest

HUB_DATA = re.compile(r"\w[\w.-]*/[\w.-]+(#[\w.-]+)?(:\w[\w:%+.\[\]-]*)?")  # org/name#config:split
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # http://, s3://, file://: no place of ours
SHORT = {"model": "checkpoint", "data": "train", "task": "name", "method": "name"}  # `model: X` is {checkpoint: X}


MOST_ALIASES = 50  # a recipe needs none; a few kilobytes of them can stand for gigabytes


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: the second would silently win; and floods of aliases."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MOST_ALIASES:
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem=f"more than {MOST_ALIASES} aliases", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, type(None))):
                raise yaml.MarkedYAMLError(problem=f"{key} is no name for a key", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f'key "{key}" stands twice', problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        here = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
        remedy = nearest(path.name, here) or (f"Recipes in {folder}: {', '.join(here[:5])}." if here else "")
        problem = "a folder, not a recipe file" if path.is_dir() else "no such recipe file"
        raise RecipeError(Fault(problem, where=str(path), expected="a YAML file", remedy=remedy))
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(Fault(f"not valid YAML: {error.problem}", where=f"{path.name}{line}")) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(Fault(f"not a YAML file: {error}", where=path.name)) from error
    if not isinstance(tree, dict):
        raise RecipeError(Fault("empty, or not a mapping", where=path.name, expected="lines such as `model: folder`"))
    return tree


def put(
    tree: dict[str, Any], path: list[str], value: Any, faults: list[Fault], clash: str = "", twin: str = ""
) -> None:
    *sections, last = path
    for section in sections:
        nest = tree[section] = {} if tree.get(section) is None else tree[section]
        if not isinstance(nest, dict):
            faults.append(Fault(f'"{section}" is no section', where=".".join(path)))
            return
        tree = nest
    if clash and last in tree:
        faults.append(Fault(f"given twice, the other time as {twin or '.'.join(path)}", where=clash))
    tree[last] = value


def lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Values of `above` win. Another method or task takes nothing over: the old one's options are not its own."""
    for key, value in above.items():
        old = below.get(key)
        if not (isinstance(old, dict) and isinstance(value, dict)) or _renamed(key, old, value):
            below[key] = value
        else:
            lay_over(old, value)


def _renamed(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return key in ("task", "method") and "name" in old and new.get("name", old["name"]) != old["name"]


def plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain values: paths and dates as text, keys as text."""
    return json.loads(json.dumps(dict(tree), default=str))


def place(where: str, sources: Mapping[str, str], name: str) -> str:
    """Where the value of a key was given: `r.yaml, written as "lr": train.learning_rate`."""
    beneath = next((source for key, source in sources.items() if key.startswith(f"{where}.")), name)
    origin = sources.get(where, beneath)
    return where if where == "command line" else f"{origin}: {where}"


def scalar(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError:
        return text


def rooted(folder: Path, place: str) -> Path:
    """Beside the recipe if it exists there, else from where the command was started."""
    if SCHEME.match(place):
        return Path(place)  # refused where it would be read
    path = Path(place).expanduser()
    beside = (folder / path).resolve()
    if not beside.exists() and not path.exists() and HUB_DATA.fullmatch(place):
        return path  # perhaps a hub id, which means the same everywhere
    return beside if beside.exists() else path.resolve()


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return keys


def commented(tree: Mapping[str, Any], notes: Mapping[str, str], prefix: str = "", indent: str = "") -> str:
    lines = ""
    for key, value in tree.items():
        where = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            lines += f"{indent}{key}:\n{commented(value, notes, f'{where}.', indent + '  ')}"
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
        short = next((notes[s] for s in (where, prefix.removesuffix(".")) if s in notes and _main(where, s)), "default")
        lines += f"{indent}{key}: {text}  # {short}\n"
    return lines


def _main(where: str, source: str) -> bool:
    """`model: X` in the file is the source of `model.checkpoint`, not of the other model keys."""
    return where == source or where == f"{source}.{SHORT.get(source)}"
