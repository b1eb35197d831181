"""What can go wrong, said so that a person can mend it: place, field, expected, got, remedy.

Knows no data, no model and no recipe. A room that finds faults collects them all and raises once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHOWN_FAULTS = 20  # enough to see the pattern, few enough to read; the rest is counted


@dataclass(frozen=True)
class Fault:
    """One thing that would stop or spoil a run.

    where: file with `row N` or `line N`, or the recipe's key; "" only where no place exists.
    """

    problem: str
    where: str = ""
    field: str = ""
    expected: str = ""
    got: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        place = self.where + (f', field "{self.field}"' if self.field else "")
        text = f"{place}: {self.problem}" if place else self.problem
        if self.expected:
            text += f"; expected {self.expected}"
        if self.got:
            text += f"{',' if self.expected else ';'} got {self.got}"
        text += "" if text.endswith((".", "?", "!")) else "."
        return text + (f" {self.remedy}" if self.remedy else "")


class TunewrightError(Exception):
    """The root of what we raise on purpose. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, faults: str | Fault | Iterable[Fault]) -> None:
        if isinstance(faults, str):
            faults = Fault(faults)
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        super().__init__(self.text())

    def text(self) -> str:
        """All faults, one a line; past `SHOWN_FAULTS` they are counted."""
        lines = [str(fault) for fault in self.faults[:SHOWN_FAULTS]]
        if len(self.faults) > SHOWN_FAULTS:
            lines.append(f"... and {len(self.faults) - SHOWN_FAULTS} more like these.")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """For `--json`: the kind of error and every fault with its parts."""
        return {"error": type(self).__name__, "faults": [asdict(fault) for fault in self.faults]}


class UserError(TunewrightError):
    """What the user gave cannot be used as it is."""

    exit_code = 2


class RecipeError(UserError):
    """A key or value of the recipe is wrong.

    rest: the recipe made of all that was right, so that its data can be looked at in the same pass; None where too
    little was.
    """

    rest: Any = None


class DataError(UserError):
    """A file or a row is wrong."""


class ModelError(UserError):
    """The checkpoint is not there, or has not the shape that the task needs."""


class MethodError(UserError):
    """The method's options do not fit this model."""


class RunError(UserError):
    """A run folder is not there, is another recipe's, or is in use."""


class TrainError(TunewrightError):
    """Training cannot go on: a loss or gradient is not finite, for instance."""


def nearest(word: str, known: Sequence[str]) -> str:
    """`Did you mean "learning_rate"?`, or "" where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'Did you mean "{near[0]}"?' if near else ""
