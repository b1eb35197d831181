"""Importing the large libraries without looking for garbage meanwhile. Knows no library by name.

torch, transformers and peft make 1.5 million objects that stay; Python walks over all it has whenever a few hundred
came in, and again in every full collection of the run. In a process of ours they are put aside instead (`gc.freeze`),
which took a quarter to a third off an import (docs/performance.md). In somebody else's process nothing is changed:
what lives there at that moment would never be collected.
"""

from __future__ import annotations

import gc
import importlib
import sys

MANY = 100  # modules; below it nothing large was imported, and what has come to live since must stay collectable
_ours = False


def own_process() -> None:
    """This process does nothing but what our command says."""
    global _ours
    _ours = True


def bring(*names: str) -> None:
    """Import these modules. To be called while little else is alive."""
    if not (_ours and gc.isenabled()):
        _import(names)
        return
    before = len(sys.modules)
    gc.disable()
    try:
        _import(names)
    finally:
        if len(sys.modules) - before >= MANY:
            gc.freeze()
        gc.enable()


def leave_out(name: str) -> None:
    """As if this library were not installed: for one that others import only because it is there.

    Only in a process of ours, which will not come to need it; Python's own way to say so (`import`'s reference).
    """
    if _ours and name not in sys.modules:
        sys.modules[name] = None  # type: ignore[assignment]


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        importlib.import_module(name)
