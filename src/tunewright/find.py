"""The folder is the registry: `method: lora` is methods/lora.py, `pkg.module:Name` is anybody's.

Finds classes by file name and builds them from a name and options. Knows no single task, method or reader,
and lists them without importing them, so that `--help` stays fast.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from tunewright.errors import Fault, RecipeError, nearest

T = TypeVar("T")
HOME = Path(__file__).parent


def names(folder: str) -> list[str]:
    """What a folder offers, in the spelling of recipes: `text_classification.py` -> `text-classification`."""
    files = (HOME / folder).glob("*.py")
    return sorted(f.stem.replace("_", "-") for f in files if not f.stem.startswith("_"))


def summary(folder: str, name: str) -> str:
    """The first line of a file's docstring, read without importing the file."""
    tree = ast.parse((HOME / folder / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def advice(folder: str, name: str) -> str:
    """When to use it: the paragraph of a file's docstring that begins with "Use it", as one line; "" without one."""
    tree = ast.parse((HOME / folder / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    paragraphs = (ast.get_docstring(tree) or "").split("\n\n")
    return " ".join(next((p for p in paragraphs if p.startswith("Use it")), "").split())


def find(folder: str, name: str, kind: type[T]) -> type[T]:
    """The class of that name.

    Raises RecipeError naming what there is, with the nearest spelling.
    """
    if ":" in name:
        return _outside(folder, name, kind)
    if name.replace("_", "-") not in names(folder):
        known = names(folder)
        raise RecipeError(
            Fault(
                f'unknown {folder.removesuffix("s")} "{name}"',
                where=folder.removesuffix("s"),
                expected="one of " + ", ".join(known) + ", or package.module:Name",
                remedy=nearest(name, known),
            )
        )
    module = importlib.import_module(f"tunewright.{folder}.{name.replace('-', '_')}")
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return next(c for c in own if issubclass(c, kind))


def _outside(folder: str, name: str, kind: type[T]) -> type[T]:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            Fault(
                f'"{name}" cannot be imported ({error})',
                where=folder.removesuffix("s"),
                expected="package.module:Name on the Python path",
            )
        ) from error
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise RecipeError(Fault(f'"{name}" is not a {kind.__name__}', where=folder.removesuffix("s")))
    return found


def build(folder: str, name: str, options: dict[str, Any], kind: type[T]) -> T:
    """The object of that name with these options; all unknown or ill-typed options are named at once."""
    cls = find(folder, name, kind)
    where = folder.removesuffix("s")
    faults = option_faults(cls, options, where)
    if faults:
        raise RecipeError(faults)
    try:
        return cls(**{key: _tidy(value) for key, value in options.items()})
    except ValueError as error:  # a dataclass checks ranges in __post_init__
        raise RecipeError(Fault(str(error), where=where)) from error


def option_faults(cls: type, options: dict[str, Any], where: str) -> list[Fault]:
    """Unknown keys and values of the wrong type, against the fields of a dataclass."""
    known = {f.name for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    faults = []
    for key, value in options.items():
        if key not in known:
            text = f'unknown key "{key}"'
            expected = "one of " + ", ".join(sorted(known)) if known else "no options here"
            faults.append(Fault(text, where=f"{where}.{key}", expected=expected, remedy=nearest(key, sorted(known))))
        elif not fits(value, hints[key]):
            faults.append(
                Fault("wrong kind of value", where=f"{where}.{key}", expected=spell(hints[key]), got=repr(value))
            )
    return faults


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can stand where the type is expected; a whole number is a fine float, a bool no number."""
    if hint is Any:
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin in (tuple, list):
        return isinstance(value, (list, tuple)) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def spell(hint: Any) -> str:
    """A type in words that a reader of YAML knows."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin in (tuple, list):
        return f"a list ({spell(args[0])})"
    if origin is dict or hint is dict:
        return "a mapping (key: value)"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    return words.get(hint, str(hint))


def _tidy(value: Any) -> Any:
    """YAML has lists, frozen dataclasses want tuples: options stay hashable and comparable."""
    return tuple(value) if isinstance(value, list) else value
